"""Counterfactuals on the real Open-I reports: quality and speed.

`python bench/bench_counterfactual.py` prints every figure; `pytest --benchmark` also times the
generator with its checks on one core. A fault counts, also in rejected counterfactuals, if the
original has none of its kind. The reports come from the installed wheel.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from cpo_fast.concepts import label_report, labeller, load_graph
from cpo_fast.concepts.graph import read_graph_json
from cpo_fast.concepts.labeller import find_mentions, find_ruled_out, split_sentences
from cpo_fast.concepts.mine import Miner, collect_evidence, mine, propose_changes
from cpo_fast.counterfactual import checks, counterfactuals, generate, prompt
from cpo_fast.counterfactual.generate import balance
from cpo_fast.counterfactual.graph import rewrite, text
from cpo_fast.counterfactual.graph.text import split_units
from cpo_fast.counterfactual.targets import drift_proneness, nearness
from cpo_fast.data import open_studies
from cpo_fast.data.openi import MESH_TERMS
from cpo_fast.errors import DataError
from cpo_fast.types import ConceptGraph, Counterfactual, Study

NINE = tuple(MESH_TERMS)

GRAMMAR = re.compile(
    r"\b([a-z]{2,}) \1\b"  # a repeated word
    r"|\b(?:and|or|with|without|of|the|no|is|are|a|an|for|but|otherwise|specifically),?\s*\."
    r"|^(?:and|or|but|with|of|is|are)\b|\b(?:and|or) (?:and|or)\b|\b(?:no|without) (?:and|or|no|"
    r"without)\b|,\s*[,.]"
    r"|\bthere is (?:no )?(?:small |moderate |large |focal |pleural |bilateral )*(?:effusions|"
    r"opacities|infiltrates|nodules)\b"
    r"|\bthere are (?:no )?(?:small |moderate |large |focal |pleural )*(?:effusion|opacity|"
    r"pneumothorax|infiltrate)\b(?! or| and|,)"
    r"|\b(?:heart size|heart|mediastinum|silhouette|vascularity|vasculature) (?:are|appear|"
    r"remain)\b(?<!and .)"
    r"|\ba (?:8|11|18|8\d|opacity|enlarged|effusion)\b|\ban (?:nodule|small|moderate)\b"
)
SIZES = re.compile(r"\b(?:small|moderate(?:ly)?|large|mild(?:ly)?|severe|tiny|\d+ mm)\b")
ZONES = re.compile(
    r"\b(?:upper|middle|lower) lobe\b|\b(?:right|left) bas\w+|\bbi?basilar|\bapical\b"
)
SIDES = re.compile(r"\b(?:right|left|bilateral|both|bibasilar)\b")

_BOTH = re.compile(r"bilateral|bi?basilar")


def load_studies() -> list[Study]:
    """Open-I studies with a findings section."""
    return [study for study in open_studies("open-i") if study.report.findings]


def score_labeller(studies: Iterable[Study], parity: int) -> dict[str, float]:
    """F1 per asserted finding against the indexers' labels, and the macro average, for ids of one
    parity."""
    counts = {name: Counter[str]() for name in NINE}
    for study in studies:
        if not study.labels or int(study.study_id.removeprefix("CXR")) % 2 != parity:
            continue
        found = label_report(study.report.text)
        for name in NINE:
            pair = (study.labels[name] == 1, found[name] == 1)
            counts[name][
                {(True, True): "tp", (False, True): "fp", (True, False): "fn"}.get(pair, "tn")
            ] += 1
    scores = {n: 2 * c["tp"] / max(2 * c["tp"] + c["fp"] + c["fn"], 1) for n, c in counts.items()}
    return scores | {"macro": statistics.mean(scores.values())}


def find_contradictions(report: str) -> set[str]:
    """Findings that one sentence asserts, directly or by implication, and another rules out."""
    lines = split_sentences(report)
    asserted = {name for line in lines for name, polarity in find_mentions(line) if polarity == 1}
    denied = set().union(*(find_ruled_out(line) for line in lines)) if lines else set()
    return asserted & denied


def find_grammar_faults(report: str) -> Counter[str]:
    return Counter(
        m.group()
        for line in split_sentences(report)
        for m in GRAMMAR.finditer(line.replace("x" * 4, ""))
    )


def select_asserting(section: str, target: str) -> str:
    """The sentences of a section that assert the target."""
    return " ".join(s for s in split_sentences(section) if (target, 1) in find_mentions(s))


def disagree(findings: str, impression: str, words: re.Pattern[str]) -> bool:
    """Whether both parts match `words` but share no match; "ly" of degrees is ignored, and "both",
    "bilateral" and "bibasilar" are one side."""
    left, right = (
        {_BOTH.sub("both", m.removesuffix("ly")) for m in words.findall(part)}
        for part in (findings, impression)
    )
    return bool(left and right and not left & right)


_NEGATOR = re.compile(r"\b(?:no|not|without|w/o|negative for|free of|clear of)\b")
_SPAN_END = re.compile(
    r"[;:(]|\b(?:but|although|though|however|which|except|is|are|was|were|has|have)\b"
)
_AS_BEFORE = re.compile(
    r"\s*(?:\w+ ){0,4}?(?:(?:change|increase|decrease|worsening|improvement|progression) "
    r"(?:in|of|to)\b|(?:changed|resolved|cleared)\b|change (?!or\b|and\b)\w)"
)
_PRESENCE = (
    "small trace tiny minimal mild mildly moderate slight slightly subtle left right "
    "bilateral bibasilar stable unchanged persistent residual improved improving worsening "
    "increased decreased chronic old healed known low scattered calcified tortuous "
    "degenerative status tube catheter line sternotomy granuloma cardiomegaly atelectasis "
    "scoliosis hernia the this there"
)
"""Words that mostly describe present findings."""


def find_negated_words(report: str) -> set[str]:
    """Words in the scope of a negation, read narrowly: up to the first comma, "and" or "with" after
    the last "or"."""
    found: set[str] = set()
    for sentence in split_sentences(report):
        for cue in _NEGATOR.finditer(sentence):
            rest = sentence[cue.end() :]
            if _AS_BEFORE.match(rest):
                continue
            end = _SPAN_END.search(rest)
            rest = rest[: end.start()] if end else rest
            last_or = rest.rfind(" or ")
            stop = re.search(r",| and | with ", rest[max(last_or, 0) :])
            found.update(
                re.findall(r"[a-z]+", rest[: stop.start() + max(last_or, 0)] if stop else rest)
            )
    return found


def find_denied_assertions(cf: Counterfactual) -> set[str]:
    """Words of _PRESENCE negated only in the counterfactual: a word-level test, independent of the
    checks, which should reject such counterfactuals."""
    negated = find_negated_words(cf.counterfactual) - find_negated_words(cf.report)
    return negated & set(_PRESENCE.split())


def measure_quality(graph: ConceptGraph, made: list[Counterfactual]) -> dict[str, float]:
    """Shares of counterfactuals that pass, keep sentences or introduce faults."""
    total = len(made)
    kept: list[float] = []
    inserted: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    unrelated, survived = 0, 0
    for cf in made:
        old = [u.plain for part in split_sections(cf.report) for u in split_units(part) if u.plain]
        new = Counter(
            u.plain for part in split_sections(cf.counterfactual) for u in split_units(part)
        )
        both = Counter(old) & new
        kept.append(both.total() / len(old))
        inserted.update((new - Counter(old)).keys())
        faults["self-contradiction"] += bool(
            find_contradictions(cf.counterfactual) - find_contradictions(cf.report)
        )
        faults["grammar"] += bool(
            find_grammar_faults(cf.counterfactual) - find_grammar_faults(cf.report)
        )
        parts = split_sections(cf.counterfactual)
        if len(parts) == 2:
            after = [select_asserting(part, cf.target) for part in parts]
            before = [select_asserting(part, cf.target) for part in split_sections(cf.report)]
            for name, words in (("side", SIDES), ("size", SIZES), ("zone", ZONES)):
                clash = disagree(*after, words)
                faults[name] += clash and not disagree(*before, words)
        gone = graph.excluded[cf.target] | {"No Finding"}
        was = {n for n, v in label_report(cf.report).items() if v == 1} - gone
        now = {n for n, v in label_report(cf.counterfactual).items() if v == 1}
        faults["denied assertions"] += cf.passed and bool(find_denied_assertions(cf))
        unrelated += len(was)
        survived += len(was & now)
    return {
        "counterfactuals": total,
        "pass all checks": sum(cf.passed for cf in made) / total,
        "sentences kept verbatim, median": statistics.median(kept),
        "unrelated findings kept": survived / max(unrelated, 1),
        "most frequent inserted sentence": inserted.most_common(1)[0][1] / total,
        **{
            f"introduced: {name}": faults[name] / total
            for name in (
                "self-contradiction",
                "grammar",
                "side",
                "size",
                "zone",
                "denied assertions",
            )
        },
    }


def score_doubted(graph: ConceptGraph, studies: Iterable[Study]) -> dict[str, float]:
    """Area under the ROC curve, per score, for uncertain against absent diseases of a report.

    Uncertainty ("may represent pneumonia") marks diseases that the signs could also indicate. Only
    asserted attributes count.
    """
    near = nearness(graph)
    miner, rows = Miner(graph), []
    for study in studies:
        labels = label_report(study.report.text)
        mentions = miner.mentions(study.report.text)
        drift = drift_proneness(graph, [a for a in graph.attributes if mentions.get(a) == 1])
        present = [name for name in graph.diseases if labels[name] == 1]
        absent = [name for name in graph.diseases if labels[name] != 1]
        if any(labels[name] == -1 for name in absent):
            for name in absent:
                nearest = max((near[name, other] for other in present), default=0.0)
                rows.append((labels[name] == -1, nearest, drift[name], nearest + drift[name]))
    truth, *scores = zip(*rows, strict=True)
    names = ("nearness", "drift-proneness", "both")
    return {n: float(roc_auc_score(truth, s)) for n, s in zip(names, scores, strict=True)}


def split_sections(report: str) -> list[str]:
    """Section texts of a report in the format of `Report.text`."""
    return [part for part in re.split(r"(?:^|\n\n)(?:FINDINGS|IMPRESSION): ", report) if part]


def print_quality(graph: ConceptGraph, made: list[Counterfactual]) -> None:
    for name, value in measure_quality(graph, made).items():
        print(f"  {name}: {value:.4f}" if value <= 1 else f"  {name}: {value:.0f}")
    print("  targets:", dict(Counter(cf.target for cf in made).most_common()))


def main() -> None:
    graph = load_graph()
    everything = list(open_studies("open-i"))
    studies = [study for study in everything if study.report.findings]
    for name, parity in (("odd ids (tuned on)", 1), ("even ids (held out)", 0)):
        scores = score_labeller(everything, parity)
        print(f"labeller F1, {name}: " + ", ".join(f"{n} {v:.3f}" for n, v in scores.items()))
    areas = ", ".join(f"{n} {v:.3f}" for n, v in score_doubted(graph, everything).items())
    print(f"uncertain against absent diseases, area under the ROC curve: {areas}")
    for seed in (42, 7):
        clear_caches()
        start = time.process_time()
        made = list(counterfactuals(studies, graph, seed=seed))
        seconds = time.process_time() - start
        print(
            f"seed {seed}: {len(made) / seconds:.0f} counterfactuals per second of one core, "
            f"checks included"
        )
        print_quality(graph, made)
    prices = balance(studies, graph)
    made = list(counterfactuals(studies, graph, prices=prices))
    print("seed 42, balanced targets")
    print_quality(graph, made)
    texts = [study.report.text for study in everything]
    for name, stream in (
        ("200,000 reports, Open-I repeated", islice(cycle(texts), 200_000)),
        ("10,000 reports, all sentences unique", make_unique(texts, 10_000)),
    ):
        clear_caches()
        start = time.process_time()
        counts = mine(read_graph_json(), stream)
        propose_changes(collect_evidence(graph, counts))
        print(f"mining, {name}: {time.process_time() - start:.1f} s of one core")


def make_unique(texts: list[str], number: int) -> Iterator[str]:
    """Reports with unique sentences, so that no sentence cache hits."""
    for index, report in enumerate(islice(cycle(texts), number)):
        yield " ".join(f"{sentence} {index}." for sentence in report.split(". "))


def clear_caches() -> None:
    """Clear the sentence caches, so that every round starts cold."""
    for module in (labeller, checks, generate, prompt, rewrite, text):
        for item in vars(module).values():
            if hasattr(item, "cache_clear"):
                item.cache_clear()


@pytest.fixture(scope="module")
def reports() -> list[Study]:
    try:
        return load_studies()
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.benchmark(timer=time.process_time)
def test_generate_and_check(benchmark: Any, reports: list[Study]) -> None:
    """6,850 counterfactuals of the 3,425 reports: rewriting and all checks on one core."""
    graph = load_graph()
    made = benchmark.pedantic(
        lambda: list(counterfactuals(reports, graph)), setup=clear_caches, rounds=3, iterations=1
    )
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["counterfactuals_per_second"] = len(made) / seconds
    benchmark.extra_info |= measure_quality(graph, made)
    assert len(made) == 2 * len(reports)


if __name__ == "__main__":
    main()
