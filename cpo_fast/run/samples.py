"""From the texts of each stage to token ids; texts that cannot be encoded are rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, cast

from cpo_fast.counting import counted
from cpo_fast.data.positions import model_positions
from cpo_fast.data.preference_values import answer_text, message_text
from cpo_fast.data.tokens import control_tokens
from cpo_fast.errors import DataError
from cpo_fast.packing import encode_all
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.context import RunContext
from cpo_fast.run.corpus import Texts
from cpo_fast.run.flag_ranges import SOURCES
from cpo_fast.training.stage_settings import TRAINING_STAGES
from cpo_fast.types import Origin, OverLong, PreferenceGroup, RejectedRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN_IDS = 10


@dataclass
class Samples:
    """Tokenised samples of both stages by split."""

    sft: dict[str, list[PreferenceGroup]]
    cpo: dict[str, list[PreferenceGroup]]


def tokenise(run: RunContext, texts: Texts) -> Samples:
    """Encode all samples with the tokenizer of `run.checkpoint`.

    Samples that cannot be encoded are rejected. A record without a sample in any stage is rejected
    as a whole and counts as not used. `max_bad_fraction` is a share of the records, each of which
    has a sample of SFT.
    """
    args, folder, base = run.args, run.folder, run.checkpoint
    samples = Samples({}, {})
    for line in find_control_tokens(texts, base.tokenizer):
        print(f"data: {line}")
    limit = model_positions(base.path)
    rejected: list[RejectedRecord] = []
    for stage in TRAINING_STAGES:
        max_length = args.max_length_of(stage)
        if limit is not None and max_length > limit:
            if stage in args.stage_names:
                print(
                    f"{stage}: the model has {counted(limit, 'position')}, fewer than --max_length "
                    f"{max_length}: samples of more than {counted(limit, 'token')} count as "
                    "over-long (--truncation)"
                )
            max_length = limit
        for split, preferences in getattr(texts, stage).items():
            if not preferences:
                getattr(samples, stage)[split] = []
                continue
            done = encode_all(
                preferences,
                base.tokenizer,
                base.images.grid if base.images else None,
                max_length=max_length,
                over_long=cast(OverLong, args.truncation),
                file=args.dataset,
                stage=stage,
                needed=split == "train" and stage in args.stage_names,
            )
            getattr(samples, stage)[split] = done.groups
            rejected += done.rejected
            if not done.groups and stage in args.stage_names:
                print(f"{stage}: no sample of split {split} is left after tokenising")
            if done.truncated:
                print(
                    f"{stage}: {counted(done.truncated, 'response')} cut to "
                    f"{counted(max_length, 'token')} (--max_length)"
                )
    merged = merge_whole_records(rejected, texts)
    folder.reject(merged)
    for (stage, reason), count in Counter((r.stage or "data", r.reason) for r in merged).items():
        print(f"{stage}: {count} set aside: {reason} (rejected_records.jsonl)")
    records = sum(map(len, texts.sft.values()))
    folder.add_data(used=records - sum(not record.stage for record in merged))
    count_sides(run, samples)
    bad = {(record.id, record.file, record.line) for record in rejected}
    folder.stop_if_too_bad(len(bad), records, args.max_bad_fraction)
    return samples


def count_sides(run: RunContext, samples: Samples) -> None:
    """Print and store how many records each stage of the run trains on and holds out, including
    stages that an earlier call trained in this folder.
    """
    args, folder = run.args, run.folder
    facts: dict[str, dict[str, int]] = {"trained_on": {}, "held_out": {}}
    for stage, splits in (("sft", samples.sft), ("cpo", samples.cpo)):
        if stage not in args.stage_names and stage not in folder.summary["stages"]:
            continue
        train = len(splits["train"])
        held_out = sum(len(groups) for split, groups in splits.items() if split != "train")
        print(f"{stage}: {counted(train, 'record')} to train on, {held_out} held out")
        facts["trained_on"][stage], facts["held_out"][stage] = train, held_out
    folder.add_data(**facts)


def check_samples(args: TrainArguments, samples: Samples) -> None:
    """Raise DataError, before the first stage trains, if a stage has no sample to train on or none
    for finding its best model.
    """
    for stage, splits in (("sft", samples.sft), ("cpo", samples.cpo)):
        if stage not in args.stage_names:
            continue
        if not splits["train"]:
            raise DataError(f"{stage}: no training sample is left; see rejected_records.jsonl")
        metric = args.stage_settings(stage).metric_for_best_model
        if (metric or args.load_best_model_at_end) and not splits["validate"]:
            raise DataError(
                f"{stage}: no sample is held out for finding the best model (--eval_fraction)"
            )
        source = (metric or "").rpartition("/")[2]
        held = {name for group in splits["train"] for name in group.sources}
        if source in SOURCES and not (source in held and len(held) > 1):
            raise DataError(
                f"--metric_for_best_model {metric}: all pairs are of {', '.join(sorted(held))}, so "
                "there are no metrics per source; name the metric without the source"
            )


def merge_whole_records(rejected: Sequence[RejectedRecord], texts: Texts) -> list[RejectedRecord]:
    """`rejected`, with a single line without a stage for a record that failed in all its stages.

    Every record has a sample of SFT, and one of CPO if it has rejected answers.
    """

    def key(id: str, origin: Origin | None) -> tuple[str, Origin]:
        return id, origin or Origin(rejected[0].file)

    if not rejected:
        return []
    pairs = {key(one.id, one.origin) for split in texts.cpo.values() for one in split}
    failed = {
        stage: {(r.id, Origin(r.file, r.line)) for r in rejected if r.stage == stage}
        for stage in TRAINING_STAGES
    }
    lost = {one for one in failed["sft"] if one in failed["cpo"] or one not in pairs}
    listed = []
    for record in rejected:
        if (record.id, Origin(record.file, record.line)) not in lost:
            listed.append(record)
        elif record.stage == "sft":
            listed.append(replace(record, stage=""))
    return listed


def find_control_tokens(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A warning about records whose text holds special tokens of the tokenizer, such as an
    end-of-turn token inside an answer; it names ids, lines and tokens, not the text."""
    special = {*control_tokens(tokenizer)} - {"<think>", "</think>"}
    end = str(tokenizer.eos_token or "")
    found: dict[str, set[str]] = {}
    for stage in (texts.sft, texts.cpo):
        for one in chain.from_iterable(stage.values()):
            found_texts = [answer_text(answer) for answer in (one.chosen, *one.rejected)]
            if one.plain:  # the text can be a rendered conversation with its own end token
                found_texts = [answer.rstrip().removesuffix(end) for answer in found_texts]
            else:
                found_texts += map(message_text, one.prompt)
            if held := {token for token in special if any(token in text for text in found_texts)}:
                line = f" (line {one.origin.line})" if one.origin and one.origin.line else ""
                found.setdefault(one.id + line, set()).update(held)
    if not found:
        return []
    tokens = ", ".join(sorted(set().union(*found.values())))
    ids = ", ".join(list(found)[:MAX_SHOWN_IDS]) + (", ..." if len(found) > MAX_SHOWN_IDS else "")
    return [
        f"records with control tokens of the model in their text: {len(found)} ({tokens}). They "
        f"are encoded as such: remove them if they are not meant. Records: {ids}"
    ]
