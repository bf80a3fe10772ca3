"""`cpo_loss` as a torch module."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor, nn

from cpo_fast.loss import checks
from cpo_fast.loss.api import CPOOutput, cpo_loss
from cpo_fast.loss.options import LossOptions

_OPTIONS = [field.name for field in fields(LossOptions) if field.name != "temperature"]


class CPOLoss(nn.Module):
    """`cpo_loss` as a module that holds the options as attributes; `forward` takes the tensors."""

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        *,
        label_smoothing: float = 0.0,
        average_log_prob: bool = False,
        simpo_gamma: float = 0.5,
        rpo_alpha: float = 0.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        impl: str | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _OPTIONS}
        super().__init__()
        checks.check_options(LossOptions(**given))
        self.__dict__.update(given)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, loss_type={self.loss_type!r}, impl={self.impl!r}"

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        segment_ids: Tensor,
        pairs: Tensor,
        *,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        bias: Tensor | None = None,
        pair_weights: Tensor | None = None,
        num_segments: int | None = None,
    ) -> CPOOutput:
        """See `cpo_loss`."""
        return cpo_loss(
            hidden,
            weight,
            labels,
            segment_ids,
            pairs,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            bias=bias,
            pair_weights=pair_weights,
            num_segments=num_segments,
            **{name: getattr(self, name) for name in _OPTIONS},
        )
