"""Full tuning of models larger than one device: FSDP2 over the decoder layers.

Each decoder layer is sharded over the ranks and gathered while it computes. Embeddings, output head
and vision tower stay whole on every rank and their gradients are summed like adapter gradients: the
loss op needs the whole head, and the decoder does not call their forward.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from cpo_fast.packing import collate
from cpo_fast.training.distributed import World
from cpo_fast.types import PackedBatch, PreferenceGroup, Prompt

FILE_SIZE = 5 * 10**9  # bytes of weights per file, as in transformers


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
        module.set_force_sum_reduction_for_comms(True)  # gloo supports only SUM
        module.set_gradient_divide_factor(1.0)
    return model.to(device)


def is_sharded(parameters: Sequence[torch.nn.Parameter]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def collect_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with shards unchanged and each tied weight once."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    aliases = every - {name for name, _ in model.named_parameters()}
    state = model.state_dict()
    return {name: value.detach() for name, value in state.items() if name not in aliases}


def write_shards(
    tensors: dict[str, torch.Tensor], folder: Path, *, files: dict[str, int] | None = None
) -> None:
    """Every rank writes its shards to safetensors files in `folder`; no tensor is gathered.

    With `files` (tensor -> number of its file, from 1) rank 0 then consolidates them in the layout
    that transformers loads. Raises CheckpointException on every rank when one cannot write.
    """
    import torch.distributed.checkpoint as dcp

    whole = files is not None
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=whole
    )
    dcp.save(tensors, storage_writer=writer)


def write_model(weights: dict[str, torch.Tensor], folder: Path, world: World) -> None:
    """Write the weights, from all ranks' shards, as model.safetensors or as several files of about
    5 GB with an index. Every rank must call it with the same names.
    """
    files, size = {}, 0
    for name, value in weights.items():
        size += value.numel() * value.element_size()
        files[name] = 1 + size // FILE_SIZE
    number = {index: rank for rank, index in enumerate(sorted(set(files.values())), start=1)}
    files = {name: number[index] for name, index in files.items()}
    write_shards(weights, folder, files=files)

    def tidy() -> None:
        shutil.rmtree(folder / "sharded")
        if len(number) == 1:
            (only,) = folder.glob("model-*.safetensors")
            only.rename(folder / "model.safetensors")
            (folder / "model.safetensors.index.json").unlink()

    world.on_main(tidy)


def name_weights_in_files(
    model: Any, write: Callable[[dict[str, torch.Tensor]], Path]
) -> dict[str, str]:
    """The name of each weight of `model` in transformers' files, which differs for some models.

    `write` saves a state dict as transformers does and returns the file; here it gets numbers as
    weights, and the file is deleted.
    """
    numbers = {name: torch.tensor([i]) for i, name in enumerate(collect_weights(model))}
    file = write(numbers)
    names = {int(value): name for name, value in load_file(file).items()}
    file.unlink()
    return {name: names[int(i)] for name, i in numbers.items()}


def read_tensors(folder: Path, place: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`, whole or in shards of any number of ranks.

    `place(name)` returns the tensor to read into; if it is a shard, only that part is read.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {name: place(name) for name in reader.read_metadata().state_dict_metadata}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)  # every rank reads independently
    return tensors


def sum_and_clip(parameters: Sequence[torch.nn.Parameter], limit: float, world: World) -> float:
    """Sum the gradients over the ranks and clip their norm to `limit`; returns the norm before.

    The norm is equal on every rank. FSDP has already summed the sharded gradients.
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


def make_filler(like_group: PreferenceGroup) -> PackedBatch:
    """A minimal batch for a rank without a pack, which must call the sharded layers too."""
    rejected: tuple[tuple[int, ...], ...] = ((0,),) if like_group.rejected else ()
    logps = (0.0,) * (1 + len(rejected)) if like_group.ref_logps else ()
    group = PreferenceGroup("filler", Prompt((0, 0)), (0,), rejected, ref_logps=logps)
    return collate([group], ((0, tuple(range(len(rejected)))),))
