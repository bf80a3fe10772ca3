"""The drift probe: how the diagnosis changes along the model's thought, and under rewordings.

The latent diagnosis z_j at position j is the distribution over findings of the closing sentence if
the thought ended after j tokens. Concept drift inside the thought (arXiv 2505.13081, section 2) is
z_j != z_j+1. `probe` computes z_j for every token. `swap_effects` measures how far z moves when the
thought is rewritten at one place (a near-synonym, a negation, the other side). All continuations of
one report are scored as one token tree (`evaluation.tree`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import rel_entr, softmax

from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.errors import UsageError
from cpo_fast.evaluation.likelihood import finding_candidates
from cpo_fast.evaluation.text import thought_of
from cpo_fast.evaluation.tree import score_tree
from cpo_fast.types import ConceptGraph, Disease, Pixels, Prompt

if TYPE_CHECKING:
    from cpo_fast.model.packed import PackedModel

SYNONYMS: tuple[tuple[str, str], ...] = (
    ("lung opacity", "opacity"),
    ("opacity", "lung opacity"),
    ("opacities", "lung opacities"),
    ("pleural effusion", "pleural fluid"),
    ("cardiac silhouette", "heart"),
    ("heart", "cardiac silhouette"),
    ("pulmonary edema", "edema"),
    ("airspace consolidation", "consolidation"),
    ("basilar density", "basal density"),
    ("basal density", "basilar density"),
    ("is seen", "is noted"),
    ("is noted", "is seen"),
    ("is present", "is seen"),
)
"""Near-synonyms that do not change the diagnosis of a report."""


def own_thought(answer: str) -> str:
    """The text inside `<think>` of `answer`, also if it is cut off; "" without a thought."""
    return thought_of(answer) if "<think>" in answer or "</think>" in answer else ""


@dataclass(frozen=True)
class Drift:
    """z along a thought of J tokens: `distribution` [J + 1, C findings], row j after j tokens."""

    findings: tuple[str, ...]
    tokens: tuple[str, ...]
    distribution: np.ndarray

    @property
    def variation(self) -> np.ndarray:
        """[J] total variation, 0..1, between z before and after each token."""
        return total_variation(self.distribution[:-1], self.distribution[1:])

    @property
    def divergence(self) -> np.ndarray:
        """[J] Jensen-Shannon divergence in bits, 0..1, between z before and after each token."""
        return jensen_shannon(self.distribution[:-1], self.distribution[1:])

    def change_points(self, threshold: float = 0.1) -> list[int]:
        """Tokens with a variation of at least `threshold`, largest first."""
        variation = self.variation
        order = np.argsort(-variation, kind="stable")
        return [int(j) for j in order if variation[j] >= threshold]


@dataclass(frozen=True)
class Swap:
    """A thought rewritten at one place; the kinds "synonym" and "side" keep the findings."""

    kind: str  # "synonym" | "side" | "negation" | "hallmark"
    before: str
    after: str
    text: str


@dataclass(frozen=True)
class Effect:
    """The effect of a swap on z after the whole thought; `distribution` [C] is z with the swap."""

    swap: Swap
    distribution: np.ndarray
    variation: float
    divergence: float


def probe(
    model: PackedModel,
    tokenizer: Any,
    prompt: Prompt,
    thought: str,
    pixels: Pixels | None = None,
    *,
    findings: Sequence[str] = LABEL_NAMES,
    image_token_id: int | None = None,
    tokens_per_pass: int = 512,
) -> Drift:
    """z_j at every position of `<think> {thought}`, from zero tokens to all.

    Raises UsageError for an empty thought or no findings.
    """
    stream = _ids(tokenizer, _open_thought(thought))
    endings = _endings(tokenizer, findings)
    continuations = [stream[:j] + ending for j in range(len(stream) + 1) for ending in endings]
    scores = score_tree(
        model, prompt, continuations, pixels, trunk=stream, image_token_id=image_token_id,
        tokens_per_pass=tokens_per_pass,
    )  # fmt: skip
    tokens = tuple(tokenizer.decode([token]) for token in stream)
    table = scores.view(len(stream) + 1, len(endings)).numpy()
    return Drift(tuple(findings), tokens, softmax(table, axis=-1))


def swap_effects(
    model: PackedModel,
    tokenizer: Any,
    prompt: Prompt,
    thought: str,
    swaps: Sequence[Swap],
    pixels: Pixels | None = None,
    *,
    findings: Sequence[str] = LABEL_NAMES,
    image_token_id: int | None = None,
    tokens_per_pass: int = 512,
) -> tuple[np.ndarray, list[Effect]]:
    """(z [C] after the unchanged thought, the effect of each swap on it)."""
    endings = _endings(tokenizer, findings)
    trunk = _ids(tokenizer, _open_thought(thought))
    streams = [trunk, *(_ids(tokenizer, _open_thought(swap.text)) for swap in swaps)]
    continuations = [stream + ending for stream in streams for ending in endings]
    scores = score_tree(
        model, prompt, continuations, pixels, trunk=trunk, image_token_id=image_token_id,
        tokens_per_pass=tokens_per_pass,
    )  # fmt: skip
    original, *swapped = softmax(scores.view(len(streams), len(endings)).numpy(), axis=-1)
    effects = [
        Effect(swap, z, float(total_variation(original, z)), float(jensen_shannon(original, z)))
        for swap, z in zip(swaps, swapped, strict=True)
    ]
    return original, effects


def drift_example(
    study_id: str, drift: Drift, original: np.ndarray, effects: Sequence[Effect]
) -> dict[str, Any]:
    """One probed study for the page. It contains text of the study, so evaluation.json is 0600.

    Returns {"study_id", "tokens" [J], "variation" [J], "divergence" [J], "findings" [C], "start"
    and "end" [C] (z before and after the thought), "swaps" [{"kind", "before", "after",
    "variation", "divergence", "distribution" [C]}]}.
    """
    return {
        "study_id": study_id,
        "tokens": list(drift.tokens),
        "variation": drift.variation.tolist(),
        "divergence": drift.divergence.tolist(),
        "findings": list(drift.findings),
        "start": drift.distribution[0].tolist(),
        "end": original.tolist(),
        "swaps": [
            {
                "kind": effect.swap.kind,
                "before": effect.swap.before,
                "after": effect.swap.after,
                "variation": effect.variation,
                "divergence": effect.divergence,
                "distribution": effect.distribution.tolist(),
            }
            for effect in effects
        ],
    }


def drift_figures(drifts: Sequence[Drift], effects: Sequence[Effect]) -> dict[str, Any]:
    """Means over a set of studies for summary.json, without any text.

    Returns {"studies", "tokens", "mean_variation" (per token), "largest_variation" (mean over
    studies of the largest token), "change_points" (per study), "swaps": {kind: {"swaps",
    "variation", "divergence", "moved" (share with a variation of 0.1 or more)}}}.
    """
    by_kind: dict[str, list[Effect]] = {}
    for effect in effects:
        by_kind.setdefault(effect.swap.kind, []).append(effect)
    variations = [drift.variation for drift in drifts]
    points = [len(drift.change_points()) for drift in drifts]
    return {
        "studies": len(drifts),
        "tokens": int(sum(map(len, variations))),
        "mean_variation": float(np.concatenate(variations).mean()) if drifts else None,
        "largest_variation": float(np.mean([v.max() for v in variations])) if drifts else None,
        "change_points": float(np.mean(points)) if drifts else None,
        "swaps": {
            kind: {
                "swaps": len(found),
                "variation": float(np.mean([effect.variation for effect in found])),
                "divergence": float(np.mean([effect.divergence for effect in found])),
                "moved": float(np.mean([effect.variation >= 0.1 for effect in found])),
            }
            for kind, found in by_kind.items()
        },
    }


def find_swaps(thought: str, graph: ConceptGraph | None = None) -> list[Swap]:
    """All swaps that apply to `thought`, one place each: synonyms, sides, removed negations.

    With a concept graph also hallmarks: a disease's hallmark replaced by another disease's.
    """
    found = [*_synonyms(thought), *_sides(thought), *_negations(thought)]
    if graph is not None:
        found += _hallmarks(thought, graph)
    return [swap for swap in found if swap.text != thought]


def _synonyms(thought: str) -> Iterator[Swap]:
    for before, after in SYNONYMS:
        # "opacity" inside "lung opacity" is left to the pair for "lung opacity".
        for match in re.finditer(rf"(?<!lung )(?<!pulmonary )\b{before}\b", thought, re.I):
            yield _replace("synonym", thought, match, after)
            break


def _sides(thought: str) -> Iterator[Swap]:
    """All sides are swapped together, so that the report stays consistent."""
    other = {"left": "right", "right": "left"}
    swapped = re.sub(
        r"\b(left|right)\b", lambda m: _match_case(other[m[0].lower()], m[0]), thought, flags=re.I
    )
    if swapped != thought:
        yield Swap("side", "left / right", "right / left", swapped)


def _negations(thought: str) -> Iterator[Swap]:
    for match in re.finditer(r"\b(There is no|No evidence of|No)\b (?=\w)", thought):
        after = "There is a " if match[1].startswith("There") else "There is "
        yield _replace("negation", thought, match, after)


def _hallmarks(thought: str, graph: ConceptGraph) -> Iterator[Swap]:
    """Replaces the phrase of a hallmark by a hallmark of the next disease that lacks the attribute.

    Diseases are taken in the graph's order, so that the replacement is the same for every model.
    """
    diseases = list(graph.diseases.values())
    for number, disease in enumerate(diseases):
        others = diseases[number + 1 :] + diseases[:number]
        for attribute in disease.hallmarks:
            match = _find_asserted(thought, graph.attributes[attribute].phrases)
            new = _foreign_hallmark(thought, attribute, others, graph)
            if match and new:
                yield _replace("hallmark", thought, match, new)
                break


def _find_asserted(thought: str, phrases: Sequence[str]) -> re.Match[str] | None:
    """The longest of `phrases` in a sentence of `thought` without a negation before it."""
    for phrase in sorted(phrases, key=len, reverse=True):
        for match in re.finditer(rf"\b{re.escape(phrase)}\b", thought, re.I):
            sentence = re.split(r"[.:]\s", thought[: match.start()])[-1]
            if not re.search(r"\b(no|not|without|free of)\b", sentence, re.I):
                return match
    return None


def _foreign_hallmark(
    thought: str, attribute: str, others: Sequence[Disease], graph: ConceptGraph
) -> str | None:
    for other in others:
        if attribute in (*other.hallmarks, *other.associations):
            continue
        for own in other.hallmarks:
            phrases = graph.attributes[own].phrases
            if phrases and not any(one.lower() in thought.lower() for one in phrases):
                return phrases[0]
    return None


def _replace(kind: str, text: str, match: re.Match[str], after: str) -> Swap:
    after = _match_case(after, match[0])
    return Swap(kind, match[0], after, text[: match.start()] + after + text[match.end() :])


def _match_case(word: str, like: str) -> str:
    return word[0].upper() + word[1:] if like[:1].isupper() else word


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Half the sum of absolute differences over the last axis, 0..1."""
    return 0.5 * np.abs(p - q).sum(axis=-1)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence over the last axis in bits, 0..1 (Lin 1991)."""
    # scipy.spatial.distance.jensenshannon would give NaN where rounding makes the sum negative.
    middle = (p + q) / 2
    return (rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=-1) / (2 * np.log(2))


def _open_thought(thought: str) -> str:
    if not thought.strip():
        raise UsageError("the thought is empty, so there is nothing to probe")
    return f"<think> {thought}"


def _endings(tokenizer: Any, findings: Sequence[str]) -> list[tuple[int, ...]]:
    if not findings:
        raise UsageError("no findings to score")
    close = _ids(tokenizer, " </think>")
    return [close + candidate for candidate in finding_candidates(tokenizer, findings)]


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
