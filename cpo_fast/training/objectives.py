"""The SFT and CPO objectives of a packed batch, as sums that a step divides once.

Both score hidden states with the loss op. An optimiser step can have any number of packs: `weigh`
gives the weight of a pack and the loop divides by the total of the step, so packing does not change
the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cpo_fast.loss import CPOOutput, cpo_loss, linear_logprobs
from cpo_fast.loss.options import LOSS_TYPES
from cpo_fast.model.packed import PackedModel
from cpo_fast.types import PackedBatch

Values = dict[str, torch.Tensor | float]


class Objective(Protocol):
    """Weight and summed losses of a packed batch; `average` computes metrics from the sums of an
    interval."""

    def weigh(self, batch: PackedBatch) -> float: ...

    def sum_losses(self, batch: PackedBatch) -> tuple[torch.Tensor, Values]: ...

    def average(self, sums: dict[str, float]) -> dict[str, float]: ...

    def computes_reference(self, batch: PackedBatch) -> bool: ...


@dataclass
class SFTObjective:
    """Negative log-likelihood, averaged over all response tokens of a step."""

    model: PackedModel
    impl: str | None = None

    def weigh(self, batch: PackedBatch) -> float:
        return float(batch.labels.numel())

    def sum_losses(self, batch: PackedBatch) -> tuple[torch.Tensor, Values]:
        weight, bias = self.model.head()
        hidden = self.model.hidden(batch)
        logps = linear_logprobs(hidden, weight, batch.labels, bias=bias, impl=self.impl)
        loss = -logps.sum()
        return loss, {"loss": loss, "weight": self.weigh(batch), "samples": batch.num_segments}

    def average(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["weight"]}

    def computes_reference(self, batch: PackedBatch) -> bool:
        return False


@dataclass
class CPOObjective:
    """The preference loss over the pairs of a step (arXiv 2505.13081, its CPO objective).

    A batch with `ref_logps` needs no reference model. Otherwise the reference is `reference`, the
    frozen copy of full tuning, or, if None, the model with its adapters off.

    `source_weights` weigh the pairs of each source (CPO++, arXiv 2604.15705): the loss of a step is
    sum(w loss) over its pairs, divided by sum(w) if `normalize`, else by the number of pairs. With
    several sources a row also has every metric per source (`loss/thinking`) and the number of its
    pairs (`pairs/thinking`).
    """

    model: PackedModel
    reference: PackedModel | None = None
    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    impl: str | None = None
    source_weights: Mapping[str, float] = field(default_factory=dict)
    normalize: bool = True

    def weigh(self, batch: PackedBatch) -> float:
        return float(self._divisors(batch).sum())

    def computes_reference(self, batch: PackedBatch) -> bool:
        return batch.ref_logps is None and LOSS_TYPES[self.loss_type].reference

    def _weights(self, batch: PackedBatch) -> torch.Tensor:
        """[P] weight of each pair without the weight of its source; plackett_luce counts a group
        once, whatever its number of pairs."""
        if self.loss_type != "plackett_luce":
            return batch.pair_weights
        chosen = batch.pairs[:, 0]
        return batch.pair_weights / torch.bincount(chosen, minlength=batch.num_segments)[chosen]

    def _factors(self, batch: PackedBatch) -> torch.Tensor:
        """[P] weight of each pair's source."""
        factors = [self.source_weights.get(name, 1.0) for name in batch.pair_sources]
        return batch.pair_weights.new_tensor(factors)

    def _divisors(self, batch: PackedBatch) -> torch.Tensor:
        weights = self._weights(batch)
        return weights * self._factors(batch) if self.normalize else weights

    def score(self, batch: PackedBatch) -> CPOOutput:
        """Apply the loss op; its `loss` covers this pack only."""
        weight, bias = self.model.head()
        hidden = self.model.hidden(batch)
        reference: dict[str, Any] = {}
        if batch.ref_logps is not None:
            reference["ref_logps"] = batch.ref_logps
        elif self.reference is not None:
            ref_weight, ref_bias = self.reference.head()
            with torch.no_grad():
                reference["ref_hidden"] = self.reference.hidden(batch)
            reference |= {"ref_weight": ref_weight.detach(), "ref_bias": ref_bias}
        elif LOSS_TYPES[self.loss_type].reference:
            reference["ref_hidden"] = self.model.hidden(batch, reference=True)
            ref_weight, ref_bias = self.model.head(reference=True)
            if ref_weight is not weight:  # an adapter on the output layer
                reference |= {"ref_weight": ref_weight.detach(), "ref_bias": ref_bias}
        return cpo_loss(
            hidden,
            weight,
            batch.labels,
            batch.segment_ids,
            batch.pairs,
            bias=bias,
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            rpo_alpha=self.rpo_alpha,
            num_segments=batch.num_segments,
            impl=self.impl,
            **reference,
        )

    def sum_losses(self, batch: PackedBatch) -> tuple[torch.Tensor, Values]:
        out = self.score(batch)
        weights = self._weights(batch)
        loss = (out.losses * weights * self._factors(batch)).sum()
        chosen, rejected = batch.pairs.unbind(1)
        tokens = torch.bincount(batch.segment_ids, minlength=batch.num_segments)
        columns = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).double(),
            "logps/chosen": out.logps[chosen],
            "logps/rejected": out.logps[rejected],
            "nll_loss": -(out.logps[chosen] / tokens[chosen]),
        }
        values: Values = {
            "loss": loss,
            "weight": self._divisors(batch).sum(),
            "samples": len(batch.pairs),
            **{name: column.sum() for name, column in columns.items()},
        }
        for source in self.source_weights if len(self.source_weights) > 1 else ():
            where = torch.tensor([name == source for name in batch.pair_sources]).to(weights.device)
            if where.any():
                values |= {
                    f"{source}:loss": (out.losses * weights)[where].sum(),
                    f"{source}:weight": weights[where].sum(),
                    f"{source}:samples": int(where.sum()),
                    **{f"{source}:{name}": column[where].sum() for name, column in columns.items()},
                }
        return loss, values

    def average(self, sums: dict[str, float]) -> dict[str, float]:
        row = _means({name: value for name, value in sums.items() if ":" not in name})
        for source in self.source_weights if len(self.source_weights) > 1 else ():
            start = f"{source}:"
            own = {n.removeprefix(start): v for n, v in sums.items() if n.startswith(start)}
            row[f"pairs/{source}"] = own.get("samples", 0.0)
            if own:
                row |= {f"{name}/{source}": value for name, value in _means(own).items()}
        return row


def _means(sums: dict[str, float]) -> dict[str, float]:
    pairs = sums["samples"]
    row = {name: value / pairs for name, value in sums.items() if "/" in name}
    row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
    return {"loss": sums["loss"] / sums["weight"], **row, "nll_loss": sums["nll_loss"] / pairs}
