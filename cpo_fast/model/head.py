"""The output layer in the form of the loss op: one weight [V, D'] and its inputs [R, D'].

D' is the hidden size D, except with LoRA on the output layer. Its low-rank product then becomes
additional columns of the matrix product, so that the op is independent of adapters:

    W h + s B A dropout(h)  =  [W, B] [h, s A dropout(h)]

Unlike W + s B A, this keeps LoRA's dropout and rounds B separately: added to half-precision weights
it would be lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cpo_fast.errors import UsageError

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear
    from transformers import PreTrainedModel

COLUMNS = 8
"""D' - D is a multiple of this, since the CUDA kernels need hidden sizes that are multiples of
8."""


class OutputHead:
    """The output layer of `base`, with its peft adapters.

    Supports a plain layer, `modules_to_save`, trainable tokens and LoRA, with peft's results.
    Raises UsageError for any other output layer.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self._lora()

    def weight(self, *, reference: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [V, D'], bias [V] or None); with `reference` without adapters."""
        layer: Any = self.base.get_output_embeddings()
        if reference:
            plain = unwrap(layer)
            return plain.weight, plain.bias
        weight, bias = _active(layer)
        products = self._lora()
        if products:
            width = sum(down.out_features for down, *_ in products)
            filler = weight.new_zeros(len(weight), -width % COLUMNS)
            columns = [up.weight.to(weight.dtype) for _, up, *_ in products]
            weight = torch.cat((weight, *columns, filler), dim=1)
        return weight, bias

    def inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, D] -> [R, D'], with the current state (on or off) of the adapters."""
        columns = []
        for down, _, dropout, scaling in self._lora():
            reduced = down(dropout(hidden.to(down.weight.dtype))) * scaling
            columns.append(reduced.to(hidden.dtype))
        if not columns:
            return hidden
        width = sum(column.shape[1] for column in columns)
        filler = hidden.new_zeros(len(hidden), -width % COLUMNS)
        return torch.cat((hidden, *columns, filler), dim=1)

    def _lora(self) -> list[tuple[nn.Linear, nn.Linear, nn.Module, float]]:
        """(A, B, dropout, scaling) of the layer's active LoRA adapters. Raises UsageError."""
        layer: Any = self.base.get_output_embeddings()
        _check(layer)
        if not _is_lora(layer) or layer.disable_adapters:
            return []
        return [
            (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name])
            for name in layer.active_adapters
            if name in layer.lora_A
        ]


def unwrap(layer: Any) -> Any:
    """The layer wrapped by peft, or the layer itself."""
    for name in ("original_module", "base_layer"):
        layer = getattr(layer, name, layer)
    return layer


def _active(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The active (weight, bias), without LoRA."""
    from peft.utils.other import ModulesToSaveWrapper

    if (tokens := _tokens(layer)) is not None and not tokens.disable_adapters:
        return tokens.get_merged_weights(tokens.active_adapters), unwrap(layer).bias
    if isinstance(layer, ModulesToSaveWrapper):
        return layer.weight, layer.bias  # of the trained copy, unless adapters are off
    plain = unwrap(layer)
    return plain.weight, plain.bias


def _tokens(layer: Any) -> Any | None:
    """The trainable tokens of a layer; a tied output layer shares them with the embeddings."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    found = getattr(layer, "token_adapter", layer)
    return found if isinstance(found, TrainableTokensLayer) else None


def _is_lora(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    return type(layer) is Linear


def _check(layer: Any) -> None:
    """UsageError for an output layer other than W h + b, with or without LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = unwrap(layer)
    if not isinstance(plain, nn.Linear):
        raise UsageError(
            f"the output layer is a {type(plain).__name__}; only a plain linear layer is supported"
        )
    if _is_lora(layer):
        _check_lora(layer)
    elif isinstance(layer, BaseTunerLayer) and _tokens(layer) is None:
        method = type(layer).__module__.split(".")[-2]
        raise UsageError(
            f"an adapter of type {method} on the output layer (lm_head) is not supported: "
            "leave lm_head out of its target modules, or use LoRA or modules_to_save"
        )


def _check_lora(layer: LoraLinear) -> None:
    faults = {
        "use_dora or another variant": bool(getattr(layer, "lora_variant", None)),
        "lora_bias": any(layer.lora_bias.values()),
        "a merged adapter (unmerge it)": layer.merged,
    }
    for fault, present in faults.items():
        if present:
            raise UsageError(
                f"LoRA on the output layer (lm_head) with {fault} is not supported: leave lm_head "
                "out of the target modules, or use plain LoRA there"
            )
