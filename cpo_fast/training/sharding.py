"""Full tuning of models that do not fit one device: FSDP2 over the decoder layers.

Each decoder layer is sharded over the ranks and gathered while it computes. Embeddings, output head
and vision tower stay whole on every rank, their gradients summed like those of adapters: the loss
op needs the head whole, and their forward is not called through the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from cpo_fast.packing import collate
from cpo_fast.training.distributed import World
from cpo_fast.types import PackedBatch, PreferenceGroup, Prompt


def shard(model: Any, device: torch.device) -> Any:
    """`model` (a transformers model on the CPU) sharded in place over all ranks, on `device`.

    Gradients are summed over the ranks, not averaged, in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trunk = getattr(model.model, "language_model", model.model)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    whole = set(trunk.get_input_embeddings().parameters())
    for module in (*trunk.layers, trunk):
        ignored = whole if module is trunk else None
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        module.set_gradient_divide_factor(1.0)
    return model.to(device)


def is_sharded(parameters: Sequence[torch.nn.Parameter]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def whole(value: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor (a collective: every rank calls it), others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A whole tensor placed and sharded as `parameter` is."""
    moved = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return moved


def whole_weights(model: torch.nn.Module, world: World) -> dict[str, torch.Tensor]:
    """The state dict with every tensor whole, on the CPU of rank 0; empty on the others."""
    weights = {}
    for name, value in model.state_dict().items():
        gathered = whole(value.detach())
        if world.is_main:
            weights[name] = gathered.cpu()
    return weights


def sum_and_clip(parameters: Sequence[torch.nn.Parameter], limit: float, world: World) -> float:
    """Sum the gradients over the ranks and clip their norm to `limit`; returns the norm before.

    The norm is the same number on every rank. FSDP has summed the sharded ones already.
    """
    plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    world.sum_gradients(plain)
    if len(plain) == len(parameters):
        return float(torch.nn.utils.clip_grad_norm_(plain, limit))
    local = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    everywhere = [p.grad for p in plain if p.grad is not None]
    squares = world.sum([float(torch.nn.utils.get_total_norm(local)) ** 2])[0]
    norm = math.sqrt(squares + float(torch.nn.utils.get_total_norm(everywhere)) ** 2)
    if norm > limit:
        for gradient in (*local, *everywhere):
            gradient.mul_(limit / (norm + 1e-6))
    return norm


def filler(like_group: PreferenceGroup) -> PackedBatch:
    """A batch of next to nothing: a rank without a pack must call the sharded layers, too."""
    rejected: tuple[tuple[int, ...], ...] = ((0,),) if like_group.rejected else ()
    logps = (0.0,) * (1 + len(rejected)) if like_group.ref_logps else ()
    group = PreferenceGroup("filler", Prompt((0, 0)), (0,), rejected, ref_logps=logps)
    return collate([group], ((0, tuple(range(len(rejected)))),))
