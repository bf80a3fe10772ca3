"""GRPO with a weight per token, on `linear_logprobs`: python examples/grpo.py MODEL PROMPTS.jsonl

For each prompt a group of answers is sampled and rewarded; an answer's advantage is its reward
minus the group's mean, divided by the group's standard deviation. The clipped objective of PPO
(arXiv 1707.06347 eq. 7), as in GRPO (arXiv 2402.03300 eq. 3), is summed with a weight per token:
diagnosis tokens weigh more than thought tokens. PROMPTS.jsonl has lines {"prompt", "findings"}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpo_fast import linear_logprobs


def grpo_loss(
    logps: Tensor,  # [R] of the sampled tokens under the policy
    old_logps: Tensor,  # [R] under the policy that sampled them
    ref_logps: Tensor,  # [R] under the reference
    advantages: Tensor,  # [R] of the answer that a token belongs to
    weights: Tensor,  # [R] of tokens
    *,
    clip: float = 0.2,
    kl: float = 0.04,
) -> Tensor:
    """The weighted mean over tokens of the clipped surrogate and the penalty for leaving the
    reference (the estimator exp(d) - d - 1 of the KL divergence, d = ref_logp - logp)."""
    ratio = torch.exp(logps - old_logps)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    d = ref_logps - logps
    return -(weights * (gain - kl * (d.exp() - d - 1))).sum() / weights.sum()


def group_advantages(rewards: Tensor) -> Tensor:
    """[prompts, G] rewards to advantages; a group of equal rewards gets 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def reward_of(text: str, findings: list[str]) -> float:
    """The share of the findings that the answer names, minus 0.001 per word."""
    named = sum(name.lower() in text.lower() for name in findings)
    return named / max(len(findings), 1) - 0.001 * len(text.split())


class Rollout:
    """`group` sampled answers of each prompt, and which of their tokens are scored."""

    def __init__(self, model: Any, tokenizer: Any, prompts: list[str], group: int, **options: Any):
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        start = batch["input_ids"].shape[1]
        with torch.no_grad():
            self.ids = model.generate(
                **batch, do_sample=True, num_return_sequences=group, **options
            )
        answers = self.ids[:, start:]
        ended = (answers == tokenizer.eos_token_id).long().cumsum(1)
        own = (ended - (answers == tokenizer.eos_token_id).long()) == 0  # up to the first end
        self.mask = torch.cat([batch["attention_mask"].repeat_interleave(group, 0), own.long()], 1)
        self.scored = torch.cat([torch.zeros(len(own), start, dtype=torch.bool), own], 1)[:, 1:]
        self.labels = self.ids[:, 1:][self.scored]  # [R]
        self.rows = self.scored.nonzero()[:, 0]  # [R] the answer of each token
        self.texts = tokenizer.batch_decode(answers, skip_special_tokens=True)

    def logps(self, model: Any, temperature: float) -> Tensor:
        """[R] log-probs of the scored tokens; logits are never formed as a whole."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        hidden = model.model(self.ids, self.mask, position_ids=positions)[0][:, :-1]
        head = model.get_output_embeddings()
        return linear_logprobs(
            hidden[self.scored], head.weight, self.labels, bias=head.bias, temperature=temperature
        )


def token_weights(rollout: Rollout, tokenizer: Any, answer_weight: float) -> Tensor:
    """[R]: 1 for the tokens of the thought, `answer_weight` for those after `</think>`."""
    weights = torch.ones(len(rollout.labels))
    for row, text in enumerate(rollout.texts):
        where = (rollout.rows == row).nonzero()[:, 0]
        if "</think>" in text:
            answer = text.split("</think>")[1]
            said = tokenizer(answer, add_special_tokens=False)["input_ids"]
            weights[where[max(0, len(where) - len(said) - 1) :]] = answer_weight
    return weights


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2, help="updates on each sample of answers")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--answer_weight", type=float, default=2.0)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    args = parser.parse_args()
    try:
        rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    except (OSError, ValueError) as error:
        parser.error(f"{args.prompts} is not a file of JSON lines: {error}")
    if not rows or any(not {"prompt", "findings"} <= set(row) for row in rows):
        parser.error(f"{args.prompts}: every line needs prompt and findings (a list of names)")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding is masked
    model, reference = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2)
    )
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    torch.manual_seed(0)
    for row in rows:
        rollout = Rollout(model, tokenizer, [row["prompt"]], args.group,
                          max_new_tokens=args.max_new_tokens,
                          temperature=args.temperature)  # fmt: skip
        rewards = torch.tensor([[reward_of(text, row["findings"]) for text in rollout.texts]])
        advantages = group_advantages(rewards).flatten()[rollout.rows]
        weights = token_weights(rollout, tokenizer, args.answer_weight)
        with torch.no_grad():
            old, ref = (rollout.logps(m, args.temperature) for m in (model, reference))
        for _ in range(args.epochs):
            loss = grpo_loss(rollout.logps(model, args.temperature), old, ref, advantages, weights)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"reward {rewards.mean():.4f} loss {loss.item():.7f}")


if __name__ == "__main__":
    main()
