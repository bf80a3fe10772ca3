"""The forward over a pack: hidden states of the scored rows, without logits.

Supports Qwen2.5-VL and text-only causal LMs of transformers, plain or wrapped by peft. The image
features of a pack are computed once and scattered into the embeddings; policy and reference share
the features of a frozen vision tower.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cpo_fast.errors import UsageError
from cpo_fast.model.head import OutputHead
from cpo_fast.model.supported import check_adapter, check_model, varlen_obstacle
from cpo_fast.types import ATTENTIONS, PackedBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PackedModel:
    """Runs `model` over PackedBatches.

    `attention` is "gathered" (K/V per branch), "sdpa" (one dense T x T mask), "varlen" (K/V per
    branch in one flash attention call; CUDA, half precision), "flex" (flex_attention with a block
    mask; CUDA) or "auto": "varlen" where the model's device and dtype can use it, else "gathered".
    All are equivalent. Raises UsageError for an unknown one, one that does not support the model's
    device, dtype, heads or attention dropout, and for a model or an adapter that packs do not
    support (`cpo_fast.model.supported`), such as sliding-window layers. A vision tower uses
    `cpo_fast.model.windows`.
    `compile` compiles the decoder layers with torch.compile: once for all layers and row lengths,
    with a graph break at the attention, whose layout changes between packs. Enable gradient
    checkpointing before.
    `fused` uses fused layers (`cpo_fast.model.fused`): CUDA in half precision, not with `compile`.
    They are off by default until they have run on a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        attention: str = "auto",
        compile: bool = False,
        fused: bool = False,
    ) -> None:
        from peft import PeftModel

        self.model = model
        self._peft = model if isinstance(model, PeftModel) else None
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if attention == "auto":
            attention = attention_for(base)
        self.attention = attention
        check_model(base, attention=attention)
        if self._peft is not None:
            from cpo_fast.model.lora import use_fused_lora

            check_adapter(self._peft)
            use_fused_lora(self._peft)
        self._base = base
        self._head = OutputHead(base)
        self._inner = base.model
        self.vision: nn.Module | None = getattr(self._inner, "visual", None)
        self.trunk = self._inner if self.vision is None else self._inner.language_model
        check_attention(attention, base.device.type, base.dtype)
        from cpo_fast.model.attention import BRANCHES
        from cpo_fast.model.windows import use_windows

        implementation = "sdpa" if attention == "sdpa" else BRANCHES
        self._base.set_attn_implementation(
            implementation if self.vision is None else {"text_config": implementation}
        )
        if self.vision is not None:
            use_windows(self.vision)
        if fused:
            from cpo_fast.model.fused import check_fused, use_fused_layers

            check_fused(base.device.type, base.dtype, compile=compile)
            use_fused_layers(base, self.vision)
        self._compiled = compile
        if compile:
            if not hasattr(self.trunk, "layers"):
                raise UsageError(
                    f"the layers of {type(base).__name__} cannot be found to compile them; "
                    "turn torch_compile off"
                )
            for layer in self.trunk.layers:
                _compile(layer)
        self._last: _Prepared | None = None

    def hidden(self, batch: PackedBatch, *, reference: bool = False) -> torch.Tensor:
        """Hidden states [R, D'] of the batch's scored rows, after the final norm, for `head`: D' is
        the hidden size, and larger with LoRA on the output layer.

        With `reference` the adapters are off and no gradients are recorded. `batch` is on the
        model's device. Raises UsageError for `reference` on a model without adapters.
        """
        if not reference:
            return self.head_inputs(self._forward(batch))
        if self._peft is None:
            raise UsageError(
                "the reference is the model with its adapters off, and this model has none; "
                "add LoRA or use cached reference log-probabilities"
            )
        with torch.no_grad(), self._peft.disable_adapter():
            return self._forward(batch)

    def head(self, *, reference: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [V, D'], bias [V] or None) of the output layer; with `reference` [V, D] and
        without adapters.
        """
        return self._head.weight(reference=reference)

    def head_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, D] of the trunk -> [N, D'], for `head`."""
        return self._head.inputs(hidden)

    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        embeddings = self.trunk.get_input_embeddings()(batch.input_ids)  # [T, D]
        if batch.pixel_values is not None:
            if self.vision is None:
                raise UsageError("the batch has images, but the model is text-only")
            is_image = batch.input_ids == self._base.config.image_token_id
            features = self._image_features(batch).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_image[:, None], features)
        if self.vision is None:
            positions = batch.position_ids[:1]  # [1, T]
        else:
            positions = batch.position_ids[:, None]  # [3, 1, T]
        row = embeddings[None]
        if self._compiled:
            # Like the output of a layer; otherwise the first layer would be compiled separately.
            row = row.clone().requires_grad_(torch.is_grad_enabled())
        out = self.trunk(
            inputs_embeds=row,
            position_ids=positions,
            use_cache=False,
            **self._prepared(batch).attention,
        )
        return out.last_hidden_state[0].index_select(0, batch.score_rows)

    def _prepared(self, batch: PackedBatch) -> _Prepared:
        """Inputs shared by policy and reference, cached for the latest batch."""
        if self._last is None or self._last.batch is not batch:
            self._last = _Prepared(batch, self._attention_inputs(batch))
        return self._last

    def _attention_inputs(self, batch: PackedBatch) -> dict[str, Any]:
        from cpo_fast.model.attention import FlexLayout, GatheredLayout, VarlenLayout, dense_mask

        if self.attention == "sdpa":
            return {"attention_mask": dense_mask(batch)}
        layouts = {"gathered": GatheredLayout, "varlen": VarlenLayout, "flex": FlexLayout}
        # A four-dimensional mask is passed through, so that the library creates none.
        return {
            "attention_mask": batch.input_ids.new_zeros(1, 1, 1, 1),
            "branch_layout": layouts[self.attention](batch),
        }

    def _image_features(self, batch: PackedBatch) -> torch.Tensor:
        """[visual tokens, D] of all images of the batch, in row order."""
        assert self.vision is not None
        prepared = self._prepared(batch)
        if prepared.image_features is not None:
            return prepared.image_features
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.no_grad() if frozen else nullcontext():
            out = self._inner.get_image_features(
                batch.pixel_values, batch.image_grid_thw, return_dict=True
            )
            images = out.pooler_output  # one [visual tokens, D] per image
            features = torch.cat([images[i] for i in batch.image_order or range(len(images))])
        if frozen:
            prepared.image_features = features
        return features


def _compile(layer: Any) -> None:
    """Compile a decoder layer; with gradient checkpointing, its recomputed function."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    inside = "__call__" not in vars(GradientCheckpointingLayer)
    if not (inside and getattr(layer, "gradient_checkpointing", False)):
        layer.compile(dynamic=True)
        return
    # In transformers 5.23 (not in 5.17) a layer's forward checkpoints itself. torch.compile finds a
    # graph break in it (attention) and would silently leave the layer uncompiled.
    checkpoint = layer._gradient_checkpointing_func

    def checkpoint_compiled(call: partial[Any], *args: Any) -> Any:
        return checkpoint(partial(_compiled_once(call.func), *call.args, **call.keywords), *args)

    layer._gradient_checkpointing_func = checkpoint_compiled


@cache
def _compiled_once(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


@dataclass(slots=True)
class _Prepared:
    """Attention inputs of a batch and, from a frozen tower, its image features."""

    batch: PackedBatch
    attention: dict[str, Any]
    image_features: torch.Tensor | None = None


def attention_for(model: PreTrainedModel) -> str:
    """Resolve "auto" for a model: "varlen" if it can run, else "gathered"."""
    if varlen_obstacle(model.config):
        return "gathered"
    try:
        _check_varlen(model.device.type, model.dtype)
    except UsageError:
        return "gathered"
    return "varlen"


def check_attention(attention: str, device: str, dtype: torch.dtype) -> None:
    """UsageError for an unknown attention, or one without support for this device ("cpu", "cuda")
    and dtype."""
    if attention not in ATTENTIONS:
        raise UsageError(f"attention={attention!r} is unknown: use {' or '.join(ATTENTIONS)}")
    if attention == "varlen":
        _check_varlen(device, dtype)
    if attention == "flex":
        _check_flex(device)


def _check_varlen(device: str, dtype: torch.dtype) -> None:
    from cpo_fast.model.attention import HALF, varlen_kernel

    if varlen_kernel() is None:
        raise UsageError(
            "attention='varlen' needs torch.nn.attention.varlen, or flash-attn; this torch "
            f"{torch.__version__} is without both; use 'gathered' or 'sdpa'"
        )
    if device != "cuda" or dtype not in HALF:
        raise UsageError(
            f"attention='varlen' needs a CUDA model in bfloat16 or float16, this one is "
            f"{dtype} on {device}; use 'gathered' or 'sdpa'"
        )


def _check_flex(device: str) -> None:
    if device != "cuda":
        raise UsageError(
            f"attention='flex' needs a CUDA model, this one is on {device}; use 'gathered' or "
            "'sdpa'"
        )
