"""For the GPU implementations: row chunks of the [T, V] logits, products with float32 sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_PAD = 64  # columns: each row of logits starts on a 128-byte line, for every V
_TILE_ROWS, _TILE_COLUMNS = 128, 256  # of the vendor library's GEMM, for counting waves


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at an address that is a multiple of 16 bytes; a copy if needed."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def padded_columns(V: int) -> int:
    """Columns of a buffer for V logits."""
    return (V + _PAD - 1) // _PAD * _PAD


def logits_buffer(like: Tensor, rows: int, V: int) -> Tensor:
    """[rows, padded V]. The padding is 0: a GEMM can read a vector past V (oneDNN does) and
    multiply it by 0, which must not give NaN."""
    buffer = like.new_empty(rows, padded_columns(V))
    buffer[:, V:].zero_()
    return buffer


def chunk_rows(
    T: int, V: int, D: int, itemsize: int, multiprocessors: int, room: int, step: int = _TILE_ROWS
) -> int:
    """Rows per chunk: the multiple of `step` that wastes the least time among those whose logits
    fit `room` bytes.

    A GEMM runs in waves of one tile per multiprocessor, and its last wave takes as long as a full
    one: with 128 x 256 tiles, D = 3584 and 132 multiprocessors, the product with W fills 85 % of
    the tile slots in chunks of 2048 rows, 95 % in chunks of 1152. A wave of the first GEMM sums D
    terms per element, a wave of the second V.
    """
    most = max(1, room // (padded_columns(V) * itemsize))
    if most >= T or most < step:
        return min(T, most)

    def time(rows: int) -> int:
        def waves(columns: int) -> int:
            tiles = -(-rows // _TILE_ROWS) * -(-columns // _TILE_COLUMNS)
            return -(-tiles // multiprocessors)

        return D * waves(V) + V * waves(D)

    def total(rows: int) -> int:
        chunks, rest = divmod(T, rows)
        return chunks * time(rows) + (time(rest) if rest else 0)

    return min(range(step, most + 1, step), key=lambda rows: (total(rows), -rows))


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def chunks(
    hidden: Tensor, weight: Tensor, room: int, step: int = _TILE_ROWS
) -> list[tuple[int, int]]:
    """(start, stop) of the chunks of the rows of `hidden` [T, D]; independent of the gradients
    wanted."""
    (T, D), V = hidden.shape, weight.shape[0]
    if T == 0:
        return []
    itemsize = hidden.element_size()
    rows = chunk_rows(T, V, D, itemsize, multiprocessors(hidden.device), room, step)
    return [(start, min(start + rows, T)) for start in range(0, T, rows)]


def slope_bytes(hidden: Tensor, weight: Tensor) -> int:
    """Extra memory for storing d logp / d logits of all rows for the head's gradient.

    With them, the backward pass does not compute the logits again: one GEMM less. Without them it
    sums dW over chunks in float32; the 4 V D bytes of that sum count as available here.
    """
    needed = hidden.shape[0] * padded_columns(weight.shape[0]) * hidden.element_size()
    return needed - (4 * weight.numel() if weight.requires_grad else 0)


@contextlib.contextmanager
def fp32_sums() -> Iterator[None]:
    """Forbid cuBLAS to add the parts of a split sum in 16 bits, which its default allows."""
    settings = torch.backends.cuda.matmul
    before = {}
    for name in (f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")):
        before[name] = getattr(settings, name)
        if hasattr(settings, f"{name}_split_k"):  # newer torch: always set with it
            before[name] = (before[name], getattr(settings, f"{name}_split_k"))
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated and added in float32, the dtype of `total`."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
