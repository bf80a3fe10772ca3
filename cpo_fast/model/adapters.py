"""peft adapters: loading, target modules, and merging into the base."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cpo_fast.errors import UsageError, first_line
from cpo_fast.flags import near
from cpo_fast.model.head import unwrap

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the adapter in `folder`, not trainable.

    Raises UsageError for an unreadable adapter or an adapter of another model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # Otherwise an adapter of another model is loaded as zeros, with a warning.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # peft uses a deprecated name of transformers.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # peft raises various types
        raise UsageError(
            f"the adapter {folder} does not fit its base model ({type(model).__name__}): "
            f"{first_line(error)[:300]}"
        ) from error


def merge(model: PeftModel) -> PreTrainedModel:
    """The base model with its adapter merged into the weights; the adapter is removed.

    If embeddings and output layer share a tensor and either is adapted, the merged model has two
    tensors. Raises UsageError for an adapter that cannot be added to weights.
    """
    base: Any = model.get_base_model()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    if getattr(base.config, "tie_word_embeddings", False) and (
        _adapted(inputs) or _adapted(outputs)
    ):
        _untie(base, unwrap(outputs))
    try:
        merged: Any = model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        kinds = ", ".join(sorted({str(c.peft_type) for c in model.peft_config.values()}))
        raise UsageError(
            f"an adapter of type {kinds} cannot be merged: {first_line(error)}"
        ) from error
    return merged


def _adapted(layer: Any) -> bool:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    shared = getattr(layer, "token_adapter", layer)  # peft shares these with the output layer
    return unwrap(layer) is not layer and not isinstance(shared, TrainableTokensLayer)


def _untie(base: Any, outputs: Any) -> None:
    """Give the output layer a separate weight."""
    outputs.weight = nn.Parameter(outputs.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
    base.all_tied_weights_keys = base.get_expanded_tied_weights_keys(all_submodels=True)


def check_targets(
    model: PreTrainedModel, targets: str | Sequence[str], *, excluded: str | None = None
) -> None:
    """UsageError for a name in `targets` that matches no module outside the pattern `excluded`.

    A name matches as in peft: the full name of a module, or its end after a dot. A str is a pattern
    or a keyword ("all-linear"), which peft checks.
    """
    if isinstance(targets, str):
        return
    if not targets:
        raise UsageError("lora_target_modules is empty; give names or all-linear")
    names = [name for name, _ in model.named_modules() if name]
    free = [name for name in names if not (excluded and re.fullmatch(excluded, name))]
    for target in targets:
        if any(_matches(name, target) for name in free):
            continue
        if any(_matches(name, target) for name in names):
            reason = "is only in the vision tower, which is frozen (freeze_vit)"
        else:
            linear = _linear_names(model)
            meant = near(target, linear)
            reason = "matches no module; " + (
                f"did you mean {meant}?" if meant else f"choose from {', '.join(linear)}"
            )
        raise UsageError(f"lora_target_modules: {target} {reason}")


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _linear_names(model: nn.Module) -> list[str]:
    """The last name components of the linear layers."""
    found = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return sorted({name.rsplit(".", 1)[-1] for name in found})
