"""How the CUDA implementations cut T x V logits into chunks of rows, and multiply in fp32 sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_PAD = 64  # columns: rows of logits begin on a 128-byte line, whatever V
_TILE_ROWS, _TILE_COLUMNS = 128, 256  # of the vendor library's GEMM, for counting waves


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from an address that is a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def padded(V: int) -> int:
    """Columns of a buffer for V logits."""
    return (V + _PAD - 1) // _PAD * _PAD


def logits_buffer(like: Tensor, rows: int, V: int) -> Tensor:
    """[rows, padded V]. The padding is 0: a GEMM that reads a vector past V (oneDNN was seen to)
    and multiplies it by 0 must not meet a NaN there."""
    buffer = like.new_empty(rows, padded(V))
    buffer[:, V:].zero_()
    return buffer


def chunk_rows(
    T: int, V: int, D: int, itemsize: int, multiprocessors: int, room: int, step: int = _TILE_ROWS
) -> int:
    """Rows per chunk: of multiples of `step` whose logits fit `room` bytes, the least wasteful.

    A GEMM runs in waves of one tile per multiprocessor, and its last wave is as long as a full one:
    with 128 x 256 tiles, D = 3584 and 132 multiprocessors the product with W fills 85 % of the
    machine in chunks of 2048 rows, 95 % in chunks of 1152. A wave of the first GEMM sums D terms
    per element, one of the second V.
    """
    most = max(1, room // (padded(V) * itemsize))
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


def chunks(
    hidden: Tensor, weight: Tensor, room: int, step: int = _TILE_ROWS
) -> list[tuple[int, int]]:
    """(start, stop) of the chunks of hidden's rows [T, D], whatever gradients are wanted."""
    (T, D), V = hidden.shape, weight.shape[0]
    if T == 0:
        return []
    multiprocessors = 132  # CPU tensors, in tests, are planned for as on an H100
    if hidden.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    rows = chunk_rows(T, V, D, hidden.element_size(), multiprocessors, room, step)
    return [(start, min(start + rows, T)) for start in range(0, T, rows)]


def keeps_slopes(hidden: Tensor, weight: Tensor, room: int, want_weight: bool) -> bool:
    """Whether d logp / d logits of all rows is kept for the head's gradient.

    Kept, the backward needs no logits a second time: one GEMM less. Where it does not fit `room`,
    chunks would be computed again and dW summed in float32; without that sum there is room for
    4 V D bytes more, and keeping takes less memory than not keeping.
    """
    needed = hidden.shape[0] * padded(weight.shape[0]) * hidden.element_size()
    return needed <= room + (4 * weight.numel() if want_weight else 0)


@contextlib.contextmanager
def fp32_sums() -> Iterator[None]:
    """Keep cuBLAS from adding the parts of a split sum in 16 bits, which its default allows."""
    settings = torch.backends.cuda.matmul
    before = {}
    for name in (f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")):
        before[name] = getattr(settings, name)
        if hasattr(settings, f"{name}_split_k"):  # set together with it, where there is one
            before[name] = (before[name], getattr(settings, f"{name}_split_k"))
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated and added in total's float32."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # no such overload on the CPU, where only tests come
        torch.addmm(total, left.float(), right.float(), out=total)
