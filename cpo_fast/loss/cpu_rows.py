"""Calls of the csrc/cpu kernels on tensors, and their workspace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cpo_fast import _cpu  # type: ignore[attr-defined]
from cpo_fast._cpu import fused_available  # ImportError with an outdated _cpu
from cpo_fast.loss.operators import Plan

_LOWEST = torch.finfo(torch.float32).min
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # rows.h
_TILE_ROW = 32  # bfloat16 numbers per cache line
ENGINES = ("amx", "avx512_bf16")  # of the fused kernel, fastest first


def _fastest_engine() -> str:
    return next((engine for engine in ENGINES if fused_available(engine)), "")


default_engine = _fastest_engine()
_isa = ""  # "" selects the widest instruction set available
_engine = default_engine  # "" selects the path that is not fused


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Inside the block, use this engine of the fused kernel ("amx", "avx512_bf16"), or these row
    kernels ("portable", "avx2", "avx512") and no fused kernel; for tests and benchmarks.

    Raises ValueError for one that the processor lacks.
    """
    global _isa, _engine
    before = _isa, _engine
    if name in ENGINES:
        if not fused_available(name):
            raise ValueError(f"this processor has no instruction set {name!r}")
        _engine = name
    else:
        _isa, _engine = _cpu.isa(name), ""
    try:
        yield
    finally:
        _isa, _engine = before


def slots() -> int:
    """Parts of the vocabulary that the fused kernel sums separately: at least one per thread."""
    return max(torch.get_num_threads(), 8)


def _two_workspaces() -> tuple[int, int]:
    """Workspace bytes of the fused kernel at D = 32 and D = 1056; they grow linearly with D."""
    threads = torch.get_num_threads()
    few, many = (_cpu.fused_workspace(D, slots(), True, True, True, threads) for D in (32, 1056))
    return few, many


# torch.compile cannot trace these; a compiled call keeps the thread count of its compilation.
slots._dynamo_marked_constant = True  # type: ignore[attr-defined]
_two_workspaces._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fused_engine(dtype: torch.dtype, D: int, room: int) -> str:
    """The engine of the fused kernel for such hidden states; "": none, or the workspace is too
    small."""
    if dtype != torch.bfloat16 or not _engine:
        return ""
    few, many = _two_workspaces()
    return _engine if few + (D + 31) * (many - few) // 1024 <= room else ""


class _Workspace(threading.local):
    """Memory reused between calls: fresh pages cost as much as a GEMM."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, *sizes: int, dtype: torch.dtype) -> list[Tensor]:
        """Flat tensors of these sizes, in the memory that earlier calls got."""
        bytes_ = [-(-size * dtype.itemsize // 64) * 64 for size in sizes]
        if sum(bytes_) > self.memory.numel():
            self.memory = torch.empty(sum(bytes_), dtype=torch.uint8)
        parts = self.memory[: sum(bytes_)].split(bytes_)
        return [part.view(dtype)[:size] for part, size in zip(parts, sizes, strict=True)]


workspace = _Workspace()


class Rows:
    """The scored rows of one call, and how logits follow from dot products with the head."""

    def __init__(
        self,
        labels: Tensor,  # [T]
        bias: Tensor | None,  # [V]
        plan: Plan,
    ) -> None:
        self.index = (labels != plan.ignore_index).nonzero().squeeze(1)  # [n] into T
        self.n = self.index.numel()
        self.T = labels.numel()
        self.labels = labels[self.index]  # [n]
        self.bias = None if bias is None else bias.float().contiguous()
        self.scale = 1 / plan.temperature
        address = 0 if self.bias is None else self.bias.data_ptr()
        self.transform = (address, plan.softcap or 0.0, self.scale)  # soft cap 0: none
        self.how = (torch.get_num_threads(), _isa)

    def scored(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The scored rows of [T, D] as one contiguous [n, D]."""
        chosen = tensor if self.n == self.T else tensor[self.index]
        return chosen.to(dtype).contiguous()

    def new_state(self) -> Tensor:
        """The initial state [5, n]: k, sum, label, slope, raised (csrc/cpu/rows.h)."""
        state = torch.zeros(5, self.n, dtype=torch.float64)
        state[0] = _LOWEST
        state[3] = 1
        return state

    def softmax_block(self, z: Tensor, first: int, start: int, state: Tensor, write: bool) -> None:
        """Fold the logits z of rows start.. and entries first.. into the state; with `write`,
        overwrite z with its exponentials E."""
        _cpu.softmax_block(
            z.data_ptr(),
            _TYPES[z.dtype],
            *z.shape,
            first,
            self.labels[start:].data_ptr(),
            *self.transform,
            state.data_ptr(),
            self.n,
            start,
            write,
            *self.how,
        )

    def residual_block(self, z: Tensor, first: int, stats: Tensor) -> None:
        """z [n, cols] becomes p - onehot, from stats [3, n]: log-sum-exp, 1 - p_y, slope."""
        _cpu.residual_block(
            z.data_ptr(),
            _TYPES[z.dtype],
            *z.shape,
            first,
            self.labels.data_ptr(),
            *self.transform,
            *(row.data_ptr() for row in stats),
            *self.how,
        )

    def accumulate(self, sums: Tensor, part: Tensor, start: int, state: Tensor) -> None:
        """sums [T, D] = raised * sums + part [rows, D], for scored rows start.. ."""
        _cpu.accumulate(
            sums.data_ptr(),
            self.index[start:].data_ptr(),
            part.data_ptr(),
            _TYPES[part.dtype],
            *part.shape,
            state[4, start:].data_ptr(),
            *self.how,
        )

    def column_sums(self, z: Tensor, coef: Tensor, sums: Tensor) -> None:
        """sums [cols] += coef [n] @ z [n, cols], in float32."""
        _cpu.column_sums(
            z.data_ptr(), _TYPES[z.dtype], *z.shape, coef.data_ptr(), sums.data_ptr(), *self.how
        )

    def finish(self, state: Tensor, grad: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [T] and stats [3, T] from the final state; converts grad [T, D] from E W to g
        in place."""
        logps, stats = torch.zeros(self.T), torch.zeros(3, self.T, dtype=torch.float64)
        _cpu.finish(
            state.data_ptr(),
            self.n,
            self.scale,
            self.labels.data_ptr(),
            self.index.data_ptr(),
            self.n,
            logps.data_ptr(),
            *(row.data_ptr() for row in stats),
            0 if grad is None else grad.data_ptr(),
            weight.data_ptr(),
            _TYPES[weight.dtype],
            weight.shape[1],
            self.how[0],
        )
        return logps, stats

    def fold(
        self,
        engine: str,
        hidden: Tensor,  # [n, D]
        ref: Tensor | None,  # [n, D]
        weight: Tensor,  # [V, D]
        grad: Tensor | None,  # [T, D] float32
        kept: Tensor | None,  # [V, n] bfloat16
        offsets: Tensor,  # [slots, n] float64
    ) -> tuple[Tensor, Tensor]:
        """Final states of policy and reference by the fused kernel.

        E holds exp(z - offset) with the offsets of `offsets`; at a label, minus the sum of the
        row's other entries. Writes E W to the scored rows of `grad`, and E to `kept`.
        """
        state, ref_state = self.new_state(), self.new_state()
        (V, D), slots = weight.shape, len(offsets)
        wanted = ref is not None, grad is not None, kept is not None
        size = _cpu.fused_workspace(D, slots, *wanted, self.how[0])
        (memory,) = workspace.take(size, dtype=torch.uint8)
        _cpu.fused_fold(
            engine,
            hidden.data_ptr(),
            0 if ref is None else ref.data_ptr(),
            weight.data_ptr(),
            self.labels.data_ptr(),
            self.index.data_ptr(),
            self.n,
            D,
            V,
            *self.transform,
            state.data_ptr(),
            ref_state.data_ptr(),
            0 if grad is None else grad.data_ptr(),
            0 if kept is None else kept.data_ptr(),
            offsets.data_ptr(),
            memory.data_ptr(),
            slots,
            self.how[0],
        )
        return state, ref_state

    def pack(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] bfloat16 in the layout that `residual_transposed` needs."""
        n, D = hidden.shape
        packed = hidden.new_empty(_cpu.fused_packed_size(n, D) + _TILE_ROW)
        packed = packed[-packed.data_ptr() // 2 % _TILE_ROW :]  # aligned to a cache line
        _cpu.fused_pack(hidden.data_ptr(), n, D, packed.data_ptr(), self.how[0])
        return packed

    def residual_transposed(
        self,
        engine: str,
        packed: Tensor,
        block: Tensor,  # [cols, D] bfloat16
        first: int,
        stats: Tensor,  # [3, n]: log-sum-exp, 1 - p_y, slope
        out: Tensor,  # [cols, n] bfloat16
    ) -> None:
        """out = p - onehot of entries first.., from float32 logits, by the fused kernel."""
        cols, D = block.shape
        padded = block.new_empty((self.how[0] * 32 + 1) * (D + 63))
        _cpu.fused_residual(
            engine,
            packed.data_ptr(),
            block.data_ptr(),
            self.labels.data_ptr(),
            *self.transform,
            *(row.data_ptr() for row in stats),
            first,
            self.n,
            D,
            cols,
            out.data_ptr(),
            (padded.data_ptr() + 63) // 64 * 64,
            self.how[0],
        )
