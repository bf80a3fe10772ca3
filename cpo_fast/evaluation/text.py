"""Similarity of the generated thought to the radiologist's report: BLEU-1..4, ROUGE-L, CIDEr-D,
METEOR, label F1.

Words are compared in lower case without punctuation. BLEU is nltk's corpus BLEU (equal to
pycocoevalcap's on the same words). ROUGE-L is the COCO variant: the F-measure with beta 1.2 of the
longest common subsequence of the whole texts, averaged over studies (the `rouge-score` package uses
beta 1). CIDEr-D is pycocoevalcap's, if installed. METEOR is version 1.5, the Java program in
pycocoevalcap (nltk has another metric of that name). Metrics that cannot be computed are listed as
missing. Label F1 compares the findings that the package's labeller reads in both texts.

Intervals are 95 %, by bootstrap over studies. Each draw sums the counts of BLEU and label F1 again.
ROUGE-L and CIDEr-D are means of per-study scores (document frequencies of all studies). METEOR's
program sums internally, so its interval is that of the mean per-study score, shifted to the corpus
score.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpo_fast.counting import counted
from cpo_fast.data.labels import NO_FINDING
from cpo_fast.errors import UsageError
from cpo_fast.evaluation.bootstrap import estimate, study_weights

VARIANTS = (
    "lower-case words without punctuation; BLEU: nltk corpus BLEU, no smoothing; "
    "ROUGE-L: COCO variant (beta 1.2); 95 % intervals by bootstrap over studies"
)
ROUGE_BETA = 1.2


def thought_of(answer: str) -> str:
    """The report inside an answer: from `<think>` to the last `</think>`, each tag optional."""
    thought = answer.rpartition("</think>")[0] if "</think>" in answer else answer
    return thought.partition("<think>")[2].strip() if "<think>" in thought else thought.strip()


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers without punctuation; 1.5 and 9-mm are one word each."""
    return re.findall(r"\w+(?:[.'/-]\w+)*", text.lower())


def text_metrics(
    references: Sequence[str],
    candidates: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Metrics of N pairs of a reference report and a candidate text.

    Returns {"bleu_1".."bleu_4", "rouge_l", "meteor" and "cider" if installed, "label_f1",
    "intervals" {metric: [low, high]}, "studies", "variants", "missing" [metric names]}. The
    interval of an undefined metric is None. Raises UsageError for unequal lengths or no text.
    """
    if len(references) != len(candidates):
        reports = counted(len(references), "reference report")
        raise UsageError(f"{reports}, but {counted(len(candidates), 'text')}")
    if not references:
        raise UsageError("no reference report to compare with")
    wanted = [split_words(text) for text in references]
    given = [split_words(text) for text in candidates]
    weights = study_weights(len(wanted), bootstrap, seed)
    values: dict[str, float] = {}
    draws: dict[str, np.ndarray] = {}
    bleu_draws = _bleu_draws(wanted, given, weights)
    for n, value in enumerate(bleu(wanted, given), start=1):
        values[f"bleu_{n}"], draws[f"bleu_{n}"] = value, bleu_draws[:, n - 1]
    scores = {
        "rouge_l": np.array([rouge_l(want, got) for want, got in zip(wanted, given, strict=True)])
    }
    values["rouge_l"] = float(scores["rouge_l"].mean())
    coco = importlib.util.find_spec("pycocoevalcap")
    if coco:
        values["cider"], scores["cider"] = cider(wanted, given)
    if coco and shutil.which("java") and _meteor_jar():
        values["meteor"], scores["meteor"] = meteor(wanted, given)
    for name, own in scores.items():
        draws[name] = weights @ own / len(wanted) + (values[name] - own.mean())
    hits = label_hits(references, candidates)
    values["label_f1"] = _pooled_f1(hits.sum(axis=0, keepdims=True)).item()
    draws["label_f1"] = _pooled_f1(weights @ hits)
    figures = {name: estimate(value, draws[name]) for name, value in values.items()}
    return {
        "studies": len(references),
        "variants": VARIANTS,
        **{name: one["value"] for name, one in figures.items()},
        "intervals": {name: one["interval"] for name, one in figures.items()},
        "missing": [name for name in ("cider", "meteor") if name not in values],
    }


def label_hits(references: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """[N, 2] float64: findings that `concepts.label_report` asserts in both texts, and their sum
    over the two texts.

    "No Finding" is left out, because a text without content has it too.
    """
    from cpo_fast.concepts import label_report

    def asserted(text: str) -> set[str]:
        labels = label_report(text).items()
        return {name for name, value in labels if value == 1 and name != NO_FINDING}

    rows = []
    for reference, candidate in zip(references, candidates, strict=True):
        want, got = asserted(reference), asserted(candidate)
        rows.append((len(want & got), len(want) + len(got)))
    return np.array(rows, dtype=np.float64)


def _pooled_f1(hits: np.ndarray) -> np.ndarray:
    """F1 of rows of summed `label_hits` [B, 2]; NaN if neither text asserts a finding."""
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * hits[:, 0] / hits[:, 1])


def _bleu_draws(
    references: Sequence[list[str]], candidates: Sequence[list[str]], weights: np.ndarray
) -> np.ndarray:
    """BLEU-1..4 [B, 4] of the corpora that contain study i weights[b, i] times."""
    rows = []
    for wanted, given in zip(references, candidates, strict=True):
        matched, total = [], []
        for n in range(1, 5):
            own, other = (
                Counter(zip(*(text[i:] for i in range(n)), strict=False))
                for text in (given, wanted)
            )
            matched.append((own & other).total())
            total.append(max(1, own.total()))  # nltk counts 1 for a text shorter than n
        rows.append([*matched, *total, len(given), len(wanted)])
    sums = weights @ np.array(rows, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(sums[:, :4] / sums[:, 4:8])
        brevity = np.minimum(0.0, 1.0 - sums[:, 9] / sums[:, 8])
    means = np.cumsum(logs, axis=1) / np.arange(1, 5)
    return np.exp(np.nan_to_num(brevity, nan=-np.inf)[:, None] + means)


def _meteor_jar() -> bool:
    coco = importlib.util.find_spec("pycocoevalcap")
    folders = (coco.submodule_search_locations if coco else None) or ()
    return any((Path(folder) / "meteor" / "meteor-1.5.jar").is_file() for folder in folders)


def meteor(
    references: Sequence[list[str]], candidates: Sequence[list[str]]
) -> tuple[float, np.ndarray]:
    """METEOR 1.5 (Denkowski and Lavie 2014) by pycocoevalcap's Java program: corpus score and
    scores [N] of the texts.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    return _coco_score(Meteor(), references, candidates)


def bleu(references: Sequence[list[str]], candidates: Sequence[list[str]]) -> list[float]:
    """Corpus BLEU-1..4, uniform weights (Papineni et al. 2002); 0 if an order never matches."""
    import warnings

    from nltk.translate.bleu_score import corpus_bleu

    weights = [tuple([1.0 / n] * n) for n in range(1, 5)]
    with warnings.catch_warnings():
        # If an order never matches, nltk warns and returns the smallest float: reported as 0.
        warnings.simplefilter("ignore")
        scores = corpus_bleu([[words] for words in references], list(candidates), weights=weights)
    return [float(score) if score > 1e-60 else 0.0 for score in scores]


def rouge_l(reference: Sequence[str], candidate: Sequence[str]) -> float:
    """F-measure (beta 1.2) of the longest common subsequence (Lin 2004); 0 if it is empty."""
    common = common_subsequence(reference, candidate)
    if not common:
        return 0.0
    precision, recall = common / len(candidate), common / len(reference)
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel over the words of `first`.

    Bit i of `column` is 0 if row i of the dynamic-programming table exceeds row i - 1 (Hyyro 2004).
    An addition carries along each run of ones, so a column costs a few big-integer operations.
    """
    where: dict[str, int] = {}
    for position, word in enumerate(first):
        where[word] = where.get(word, 0) | 1 << position
    full = (1 << len(first)) - 1
    column = full
    for word in second:
        matched = column & where.get(word, 0)
        column = (column + matched | column - matched) & full
    return len(first) - column.bit_count()


def cider(
    references: Sequence[list[str]], candidates: Sequence[list[str]]
) -> tuple[float, np.ndarray]:
    """CIDEr-D (Vedantam et al. 2015) by pycocoevalcap, document frequencies from `references`: mean
    score and scores [N] of the texts.
    """
    from pycocoevalcap.cider.cider import Cider

    return _coco_score(Cider(), references, candidates)


def _coco_score(
    scorer: Any, references: Sequence[list[str]], candidates: Sequence[list[str]]
) -> tuple[float, np.ndarray]:
    wanted, given = (
        {i: [" ".join(words)] for i, words in enumerate(texts)}
        for texts in (references, candidates)
    )
    score, own = scorer.compute_score(wanted, given)
    return float(score), np.array(own, dtype=np.float64)
