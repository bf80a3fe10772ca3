"""From a data set to the texts of each stage: reading, rejecting, pairing."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpo_fast.concepts import load_graph
from cpo_fast.concepts.graph import DEFAULT_GRAPH
from cpo_fast.counterfactual import (
    build_sft_preference,
    counterfactuals,
    pair_with_counterfactuals,
    place_images,
    study_labels,
)
from cpo_fast.counterfactual.perception import (
    build_pool,
    perception_counterfactuals,
    with_perception,
)
from cpo_fast.counting import counted
from cpo_fast.data import is_preference_file, open_preferences, open_studies
from cpo_fast.data.preference_values import answer_text
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.folders import write_jsonl
from cpo_fast.run.arguments import SOURCES, TrainArguments
from cpo_fast.run.context import RunContext
from cpo_fast.run.split import describe_sizes, split_by_question, take_questions
from cpo_fast.types import (
    SPLITS,
    ConceptGraph,
    Counterfactual,
    ImageRef,
    Preference,
    RejectedRecord,
    Study,
)

# --- files -> studies ----------------------------------------------------------------------------


@dataclass
class Corpus:
    """The records read: studies by split, or the preferences of a file without studies.

    `read` counts records, `rejected` those that the reader rejected.
    """

    kind: str
    read: int = 0
    rejected: int = 0
    studies: dict[str, list[Study]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    preferences: list[Preference] = field(default_factory=list)


def read_corpus(run: RunContext) -> Corpus:
    """Read the data set. Unusable records are rejected; too many of them raise DataError."""
    args, folder = run.args, run.folder
    dataset = args.dataset
    if is_preference_file(dataset, args.dataset_format):
        source: Any = open_preferences(
            dataset, dataset_format=args.dataset_format, image_root=args.image_root
        )
        corpus = Corpus(source.kind)
        corpus.preferences = list(tqdm(source, desc="read", unit="record", disable=None))
        used = len(corpus.preferences)
    else:
        source = open_studies(
            dataset,
            dataset_format=args.dataset_format,
            sections=args.sections,
            image_root=args.image_root,
        )
        corpus = Corpus(source.kind)
        for study in tqdm(source, desc="read", unit="study", disable=None):
            corpus.studies[study.split].append(
                replace(study, images=study.images[: args.max_images], labels=study_labels(study))
            )
        if args.max_train_samples is not None:
            left_out = len(corpus.studies["train"][args.max_train_samples :])
            del corpus.studies["train"][args.max_train_samples :]
            folder.left_out += left_out
            studies = counted(left_out, "training study", "training studies")
            print(f"data: {studies} left out by --max_train_samples")
        used = sum(map(len, corpus.studies.values()))
    corpus.read, corpus.rejected = source.read, len(source.rejected)
    folder.reject(source.rejected)
    folder.add_data(read=source.read, used=used, kind=corpus.kind, dataset=str(dataset))
    print(f"data: {corpus.kind} at {dataset}: {source.read} read, {used} used")
    for reason, count in source.reasons().items():
        print(f"data: {count} set aside: {reason}")
    for line in source.remarks():
        print(f"data: {line}")
    if unpaired := sum(not one.rejected for one in corpus.preferences):
        print(f"data: {counted(unpaired, 'record')} without a rejected answer, for SFT only")
    records: list[Preference | Study] = [*corpus.preferences]
    records += chain.from_iterable(corpus.studies.values())
    reports = not corpus.preferences or corpus.kind in ("ccf", "counterfactuals")
    if reports and records and not any(one.images for one in records):
        print("data: no record has an image: the model learns reports from text only")
    folder.stop_if_too_bad(len(source.rejected), source.read, args.max_bad_fraction)
    return corpus


# --- studies -> counterfactuals -> preferences ---------------------------------------------------


@dataclass
class Texts:
    """The texts of both stages by split, and the counterfactuals of the CPO part.

    `seconds` is the time that generating the counterfactuals took; None if they were read.
    """

    sft: dict[str, list[Preference]]
    cpo: dict[str, list[Preference]]
    counterfactuals: list[Counterfactual] = field(default_factory=list)
    seconds: float | None = None

    def has_images(self) -> bool:
        return any(p.images for split in self.sft.values() for p in split)

    def training_answers(self) -> list[str]:
        """All answers of the training split as text."""
        return [
            answer_text(answer)
            for one in (*self.sft["train"], *self.cpo["train"])
            for answer in (one.chosen, *one.rejected)
        ]


def build_texts(run: RunContext, corpus: Corpus) -> Texts:
    """The graph and counterfactual stages; a preference file needs neither."""
    args, folder = run.args, run.folder
    if corpus.preferences:
        kept = select_sources(corpus.preferences, args.source_weights(SOURCES))
        texts = split_preferences(kept, args.eval_fraction, args.seed, args.max_train_samples)
        used = sum(map(len, texts.sft.values()))
        folder.left_out += len(kept) - used
        folder.add_data(used=used)
        return texts
    texts = obtain_counterfactuals(run, corpus)
    home = Path(args.counterfactuals).parent if args.counterfactuals else folder.path
    of_study: dict[str, list[Counterfactual]] = {}
    for one in texts.counterfactuals:
        of_study.setdefault(one.study_id, []).append(one)
    for split, studies in corpus.studies.items():
        texts.sft[split] = [
            build_sft_preference(s, uncertain=args.uncertain_labels) for s in studies
        ]
        texts.cpo[split] = [
            pair_study(args, study, of_study[study.study_id], home)
            for study in studies
            if study.study_id in of_study
        ]
    return texts


def pair_study(
    args: TrainArguments, study: Study, cfs: Sequence[Counterfactual], home: Path
) -> Preference:
    """The study's answer against all its counterfactuals, thinking first, so that the chosen answer
    is computed once. Image paths of the counterfactuals are relative to `home`."""
    thinking = [cf for cf in cfs if cf.kind == "thinking"]
    if thinking:
        made = pair_with_counterfactuals(
            study, thinking, rejected_answer=args.rejected_answer, uncertain=args.uncertain_labels
        )
    else:
        made = build_sft_preference(study, uncertain=args.uncertain_labels)
    for cf in cfs:
        if cf.kind == "perception":
            root = study.images[0].root if study.images else ""
            shown = tuple(relate_image(root, home / path) for path in cf.rejected_images)
            made = with_perception(made, shown)
    return made


def relate_image(root: str, path: Path) -> ImageRef:
    """The image by its path relative to the root of the data set, as studies name it."""
    whole, top = path.resolve(), Path(root).resolve()
    return ImageRef(str(whole.relative_to(top) if whole.is_relative_to(top) else whole), root)


def select_sources(preferences: Sequence[Preference], sources: Collection[str]) -> list[Preference]:
    """The preferences with only the rejected answers of these sources; prints how many are left
    out. A preference without any serves SFT only."""
    kept, left_out = [], Counter[str]()
    for one in preferences:
        names = one.sources
        where = [k for k, name in enumerate(names) if name in sources]
        left_out.update(name for name in names if name not in sources)
        kept.append(keep_answers(one, where))
    for name, count in left_out.items():
        pairs = counted(count, f"{name} pair")
        print(f"data: {pairs} left out by --counterfactual_sources or --{name}_weight")
    return kept


def keep_answers(one: Preference, where: Sequence[int]) -> Preference:
    """The preference with only the rejected answers at these indices."""
    if len(where) == len(one.rejected):
        return one
    parts: dict[str, Any] = {
        name: tuple(value[k] for k in where) if value else ()
        for name in ("rejected", "rejected_images", "rejected_prompts")
        for value in (getattr(one, name),)
    }
    return replace(one, **parts)


def obtain_counterfactuals(run: RunContext, corpus: Corpus) -> Texts:
    """Texts with counterfactuals only: read from `counterfactuals` or an earlier run, or generated
    along the graph."""
    args, folder = run.args, run.folder
    path = folder.path / "counterfactuals.jsonl"
    sources = args.source_weights(("thinking",))
    graph = load_graph(args.concept_graph)  # rejects a bad file before any work
    if "graph" in args.stage_names and folder.is_writer:
        shutil.copyfile(args.concept_graph or DEFAULT_GRAPH, folder.path / "concept_graph.json")
    makes = "counterfactual" in args.stage_names and folder.prepares_inputs
    if args.counterfactuals is not None or not makes:
        given = Path(args.counterfactuals or path)
        if not given.is_file() and "cpo" not in args.stage_names:
            return Texts({}, {})  # SFT and evaluation need none
        if not given.is_file():
            raise UsageError(f"{given}: no such file; add counterfactual to --stages")
        found = [one for one in read_counterfactuals(given) if one.kind in sources]
        if missing := [name for name in sources if all(one.kind != name for one in found)]:
            raise UsageError(
                f"{given} has no {' and no '.join(missing)} counterfactual; make them with "
                "counterfactual in --stages, or leave them out of --counterfactual_sources"
            )
        folder.add_data(counterfactuals={"read": len(found)})
        return Texts({}, {}, found)
    begun = time.perf_counter()
    parts = (corpus.studies[split] for split in SPLITS)
    made = (one for part in parts for one in generate_split(args, folder.path, graph, part))
    studies = sum(map(len, corpus.studies.values()))
    expected = studies * sum(args.num_targets if s == "thinking" else 1 for s in sources)
    passed = []
    failing = 0
    failed: Counter[str] = Counter()  # by check; one may fail several
    origins = {study.study_id: study.origin for part in corpus.studies.values() for study in part}
    for one in tqdm(made, desc="counterfactuals", unit="report", disable=None, total=expected):
        if one.passed:
            passed.append(one)
        else:
            checks = [name for name, good in one.checks.items() if not good]
            failing += 1
            failed.update(checks)
            error = RecordError("counterfactual-checks", ",".join(checks))
            origin = origins[one.study_id]
            folder.reject([RejectedRecord.of(one.id, origin, error, stage="counterfactual")])
    counts = Counter(one.kind for one in passed)
    if missing := [name for name in sources if not counts[name]]:
        raise DataError(
            f"no {' and no '.join(missing)} counterfactual passes its checks; see "
            f"{folder.path / 'rejected_records.jsonl'}"
        )
    seconds = round(time.perf_counter() - begun, 2)
    if folder.is_writer:
        write_jsonl(path, (one.to_json() for one in passed))
    total = len(passed) + failing
    folder.add_data(counterfactuals={"made": total, "passed": len(passed), "failed": dict(failed)})
    if len(sources) > 1:
        folder.add_data(counterfactual_sources=dict(counts))
    if args.print_example and passed:
        print_example(passed[0])
    print(f"counterfactuals: {len(passed)} of {total} pass all checks")
    return Texts({}, {}, passed, seconds)


def generate_split(
    args: TrainArguments, home: Path, graph: ConceptGraph, studies: Sequence[Study]
) -> Iterator[Counterfactual]:
    """The counterfactuals of one split, study by study; images are swapped within the split.

    Image paths become relative to `home`.
    """
    found = [place_images(study, home) for study in studies]
    sources = args.source_weights(("thinking",))
    made: list[Iterator[Counterfactual]] = []
    if "thinking" in sources:
        made.append(counterfactuals(found, graph, num_targets=args.num_targets, seed=args.seed))
    if "perception" in sources:
        made.append(
            perception_counterfactuals(found, build_pool(found, graph), graph, seed=args.seed)
        )
    return chain(*made)


def print_example(one: Counterfactual) -> None:
    """Print a counterfactual; it is not logged, because it holds a patient's report."""
    names = (", ".join(one.labels), ", ".join(one.counterfactual_labels))
    print(f"--- {one.study_id}, diagnosis {names[0]}\n{one.report}")
    print(f"--- the same with {one.target}, diagnosis {names[1]}\n{one.counterfactual}\n---")


def read_counterfactuals(path: Path) -> list[Counterfactual]:
    """The records of a counterfactuals.jsonl; DataError names a line that is not one."""
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                found.append(Counterfactual.from_json(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                kind = type(error).__name__
                raise DataError(f"{path}:{number}: not a counterfactual record ({kind})") from None
    return found


def split_preferences(
    preferences: Sequence[Preference], share: float, seed: int, most: int | None = None
) -> Texts:
    """Train and held-out texts of a file without splits (`split_by_question`); prints their sizes.
    At most `most` records are trained on. A record without a rejected answer serves SFT only."""
    split = split_by_question(preferences, share, seed)
    train = split.train if most is None else take_questions(split.train, most)
    texts = Texts({s: [] for s in SPLITS}, {s: [] for s in SPLITS})
    for name, part in (("train", train), ("validate", split.held_out)):
        for one in part:
            texts.sft[name].append(
                replace(one, rejected=(), rejected_images=(), rejected_prompts=())
            )
            if one.rejected:
                texts.cpo[name].append(one)
    if left_out := len(split.train) - len(train):
        records = counted(left_out, "training record")
        print(f"data: {records} left out by --max_train_samples {most}")
    print(f"data: to train on: {describe_sizes(train)}")
    if share > 0:
        print(f"data: held out (--eval_fraction {share:g}): {describe_sizes(split.held_out)}")
        if split.note:
            print(f"data: {split.note}")
        if texts.cpo["train"] and not texts.cpo["validate"]:
            print("data: no pair is held out: CPO has nothing to evaluate on")
    return texts
