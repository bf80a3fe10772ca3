"""Log-probs of many candidate answers per prompt; the prompt is computed once.

The candidates of a prompt are branches of one pack. Log-probs are computed from hidden states
without storing logits over the vocabulary. This replaces generation where a score is needed instead
of a decision (multi-label AUC).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cpo_fast.counting import counted
from cpo_fast.data.labels import LABEL_NAMES, answer
from cpo_fast.errors import RecordError, UsageError
from cpo_fast.types import Pixels, PreferenceGroup, Prompt

if TYPE_CHECKING:
    import torch

    from cpo_fast.model.packed import PackedModel

Candidates = Sequence[Sequence[int]]
"""C answers as token ids."""


def score_answers(
    model: PackedModel,
    prompts: Sequence[Prompt],
    candidates: Candidates | Sequence[Candidates],
    pixels: Pixels | None = None,
    *,
    image_token_id: int | None = None,
    packing_length: int = 4096,
    impl: str | None = None,
    failed: dict[int, RecordError] | None = None,
    description: str = "scoring",
) -> torch.Tensor:
    """Log-probability of every candidate after every prompt: [N, C] float32 on the CPU.

    `candidates` are C answers for all prompts, or N lists of C answers, one per prompt. The sum is
    over all tokens of an answer. A pack holds whole prompts with all of their candidates, up to
    `packing_length` tokens; a longer prompt gets its own pack. `impl` is passed to
    `linear_logprobs`. A prompt whose image cannot be read raises RecordError; if `failed` is given,
    `failed[index]` is set to the error instead and the row is NaN. Raises UsageError for an empty
    prompt or answer, or lists of unequal length.
    """
    import torch
    from tqdm import tqdm

    from cpo_fast.evaluation.generate import evaluating
    from cpo_fast.loss import linear_logprobs
    from cpo_fast.loss.segments import segment_sums
    from cpo_fast.packing import collate
    from cpo_fast.packing.readable import readable

    groups = _groups(prompts, candidates)
    width = 1 + len(groups[0].rejected) if groups else 0
    scores = torch.zeros(len(groups), width)
    weight, bias = model.head()
    with (
        evaluating(model.model),
        torch.inference_mode(),
        tqdm(total=len(groups), desc=description, unit="study", disable=None) as bar,
    ):
        for pack in _packs(groups, packing_length):
            parts = tuple((i, tuple(range(width - 1))) for i in pack)
            found = readable(groups, parts, pixels, image_token_id)
            for index, error in found.failed:
                if failed is None:
                    raise error
                failed[index] = error
                scores[index] = torch.nan
            bar.update(len(pack))
            if not found.pack:
                continue
            batch = collate(
                groups,
                found.pack,
                pixels=found.decoded.__getitem__ if pixels else None,
                image_token_id=image_token_id,
            )
            batch = batch.to(weight.device)
            hidden = model.hidden(batch)
            logps = linear_logprobs(hidden, weight, batch.labels, bias=bias, impl=impl)
            sums = segment_sums(logps, batch.segment_ids, batch.num_segments)
            # Segments are in the order of the pack's groups, candidate 0 (chosen) first in each.
            read = [index for index, _ in found.pack]
            scores[read] = sums.view(len(read), width).float().cpu()
    return scores


def finding_candidates(
    tokenizer: Any, findings: Sequence[str] = LABEL_NAMES
) -> list[tuple[int, ...]]:
    """Token ids of " The disease of this patient is {finding}.", one candidate per finding."""
    texts = [f" {answer([name])}" for name in findings]
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def after_thought(prompt: Prompt, tokenizer: Any, thought: str) -> Prompt:
    """`prompt` followed by `<think> {thought} </think>`; the thought can be empty."""
    text = f"<think> {thought} </think>" if thought else "<think> </think>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt((*prompt.input_ids, *ids), prompt.images)


def finding_distribution(scores: torch.Tensor) -> torch.Tensor:
    """[..., C] log-probs of candidates -> probabilities that sum to 1 over the candidates."""
    import torch

    return torch.softmax(scores.double(), dim=-1)


def _groups(
    prompts: Sequence[Prompt], candidates: Candidates | Sequence[Candidates]
) -> list[PreferenceGroup]:
    """Each prompt with its candidates as the branches of a group."""
    if not prompts:
        return []
    if not candidates or not len(candidates[0]):
        raise UsageError("no candidate answer to score")
    shared = not isinstance(candidates[0][0], Sequence)
    lists: Sequence[Any] = [candidates] * len(prompts) if shared else candidates
    if len(lists) != len(prompts):
        candidate_lists = counted(len(lists), "list of candidates", "lists of candidates")
        raise UsageError(f"{counted(len(prompts), 'prompt')}, but {candidate_lists}")
    if len({len(own) for own in lists}) != 1:
        raise UsageError("every prompt needs the same number of candidates")
    groups = []
    for number, (prompt, own) in enumerate(zip(prompts, lists, strict=True)):
        if not prompt.input_ids or not all(len(one) for one in own):
            raise UsageError(f"prompt {number} or one of its candidates is empty")
        first, *others = (tuple(one) for one in own)
        groups.append(PreferenceGroup(str(number), prompt, first, tuple(others)))
    return groups


def _packs(groups: Sequence[PreferenceGroup], packing_length: int) -> Iterator[tuple[int, ...]]:
    pack: list[int] = []
    used = 0
    for index, group in enumerate(groups):
        tokens = len(group.prompt.input_ids) + len(group.chosen) + sum(map(len, group.rejected))
        if pack and used + tokens > packing_length:
            yield tuple(pack)
            pack, used = [], 0
        pack.append(index)
        used += tokens
    if pack:
        yield tuple(pack)
