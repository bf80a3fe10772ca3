"""Fused linear head and log-sum-exp: log-probs of the labels without writing any logits.

A tiled product H W^T keeps its logits in fp32 accumulators. The epilogue of each tile writes, per
row, the maximum of the tile's logits and the sum of their exponentials (without the label's), and
the label's logit if the tile contains it. A second, small kernel combines the tiles of a row. With
T rows and n = ceil(V / BV) tiles the partial results take 8 T n bytes: 39 MB at T = 8192,
V = 152,064, where the logits would be 2.5 GB.

The arithmetic of a tile and the order in which tiles are combined depend on V, dtype and options
only, not on T or on the assignment of tiles to multiprocessors, so a token's log-prob is bitwise
independent of the rest of the batch. Logits are never rounded to the inputs' dtype.

`impl="triton"` does not use it: on an H200 it takes 1.29 times as long as the product alone at 7B;
the vendor GEMM and a row pass take 1.09 times as long (docs/gpu.md). It stores no logits.

Tested on an H200 in bfloat16 (docs/gpu.md), in Triton's interpreter, and by ahead-of-time
compilation for sm_90.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cpo_fast.kernels.numerics import (
    final_logits,
    launching_on,
    logp_from_parts,
    shift,
)


# T does not specialise the binary, so that the compiler's choices are independent of it.
@triton.jit(do_not_specialize=["T"])
def linear_lse_kernel(
    hidden_ptr,  # [T, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    labels_ptr,  # [T] int64
    max_ptr,  # [n_v, T] float32
    sum_ptr,  # [n_v, T] float32
    label_logit_ptr,  # [T] float32
    T,
    V,
    D,
    hidden_stride,
    weight_stride,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,  # D is a multiple of BD
    PRECISION: tl.constexpr,  # of products of fp32 inputs
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    n_t = tl.cdiv(T, BT)
    n_v = tl.cdiv(V, BV)
    # Row blocks vary fastest within groups of GROUP: their H (15 MB at D = 3584) stays in L2, and
    # each tile of W is read from memory once per group.
    i_tile = tl.program_id(0)
    i_group = i_tile // (GROUP * n_v)
    group_rows = tl.minimum(n_t - i_group * GROUP, GROUP)
    i_t = i_group * GROUP + (i_tile % (GROUP * n_v)) % group_rows
    i_v = (i_tile % (GROUP * n_v)) // group_rows

    rows = i_t * BT + tl.arange(0, BT)
    cols = i_v * BV + tl.arange(0, BV)
    # Beyond the edges the last row is read again; the main loop then needs no row masks.
    h_rows = tl.minimum(rows, T - 1).to(tl.int64)
    w_rows = tl.minimum(cols, V - 1).to(tl.int64)
    dims = tl.arange(0, BD)
    h_ptrs = hidden_ptr + h_rows[:, None] * hidden_stride + dims[None, :]  # [BT, BD]
    w_ptrs = weight_ptr + w_rows[None, :] * weight_stride + dims[:, None]  # [BD, BV]

    acc = tl.zeros([BT, BV], dtype=tl.float32)
    for start in range(0, D, BD):
        if EVEN_D:
            b_h = tl.load(h_ptrs)
            b_w = tl.load(w_ptrs)
        else:
            b_h = tl.load(h_ptrs, mask=dims[None, :] < D - start, other=0.0)
            b_w = tl.load(w_ptrs, mask=dims[:, None] < D - start, other=0.0)
        acc = tl.dot(b_h, b_w, acc, input_precision=PRECISION)
        h_ptrs += BD
        w_ptrs += BD

    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    z, _slope = final_logits(acc, bias, softcap, inv_temperature, HAS_SOFTCAP)
    in_rows = rows < T
    label = tl.load(labels_ptr + rows, mask=in_rows, other=-1).to(tl.int32)  # [BT]
    is_label = cols[None, :] == label[:, None]
    label_logit = tl.sum(tl.where(is_label, z, 0.0), axis=1)
    owned = (label >= i_v * BV) & (label < tl.minimum(V, i_v * BV + BV))
    tl.store(label_logit_ptr + rows, label_logit, mask=in_rows & owned)

    z = tl.where(is_label | (cols >= V)[None, :], float("-inf"), z)
    m = tl.max(z, axis=1)
    s = tl.sum(tl.exp(z - shift(m)[:, None]), axis=1)
    o_part = i_v.to(tl.int64) * T + rows
    tl.store(max_ptr + o_part, m, mask=in_rows)
    tl.store(sum_ptr + o_part, s, mask=in_rows)


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    max_ptr,  # [n_v, T] float32
    sum_ptr,  # [n_v, T] float32
    label_logit_ptr,  # [T] float32
    labels_ptr,  # [T] int64
    logps_ptr,  # [T] float32
    T,
    V,
    n_v,
    ignore_index,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    in_rows = rows < T
    b_max = tl.full([BN, BT], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BN, BT], dtype=tl.float32)
    for start in range(0, n_v, BN):
        tiles = start + tl.arange(0, BN)
        o_part = tiles[:, None].to(tl.int64) * T + rows[None, :]
        mask = (tiles < n_v)[:, None] & in_rows[None, :]
        part_max = tl.load(max_ptr + o_part, mask=mask, other=float("-inf"))
        part_sum = tl.load(sum_ptr + o_part, mask=mask, other=0.0)
        raised = tl.maximum(b_max, part_max)
        offset = shift(raised)
        b_sum = b_sum * tl.exp(b_max - offset) + part_sum * tl.exp(shift(part_max) - offset)
        b_max = raised
    m = tl.max(b_max, axis=0)
    s = tl.sum(b_sum * tl.exp(b_max - shift(m)[None, :]), axis=0)

    label = tl.load(labels_ptr + rows, mask=in_rows, other=0)
    valid = in_rows & (label >= 0) & (label < V)
    label_logit = tl.load(label_logit_ptr + rows, mask=valid, other=float("nan"))
    logp, _not_label = logp_from_parts(m, s, label_logit)
    tl.store(logps_ptr + rows, tl.where(label == ignore_index, 0.0, logp), mask=in_rows)


class Tile(NamedTuple):
    """Tile shape and launch parameters of `linear_lse_kernel`."""

    BT: int
    BV: int
    BD: int
    num_warps: int
    num_stages: int


def linear_tile(dtype: torch.dtype, *, plain: bool, large: bool) -> Tile:
    """The tile for inputs of `dtype`, the same for every T, so that log-probs do not depend on T.

    16-bit: two warp groups, each with 64 x 256 of the tile in accumulators, 128 registers per
    thread: one program per SM, whose 4 stages of 48 KB take 192 of the 227 KB of shared memory of a
    `large` device. With a bias or a soft cap (not `plain`) the epilogue would spill, so the tile is
    half as wide; its 3 stages of 32 KB also fit the 99 KB of the smallest devices since Ampere.
    fp32 runs on the FMA units, for which 64 x 64 is enough.
    """
    if dtype == torch.float32:
        return Tile(BT=64, BV=64, BD=32, num_warps=4, num_stages=3)
    if plain and large:
        return Tile(BT=128, BV=256, BD=64, num_warps=8, num_stages=4)
    return Tile(BT=128, BV=128, BD=64, num_warps=8, num_stages=3)


def is_large(device: torch.device) -> bool:
    """Whether a block can use 227 KB of shared memory: compute capability 9.x and 10.x."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


GROUP = 16
"""Row blocks that share a pass over W."""
COMBINE_TILE = (32, 32)
"""(BN, BT): 32 rows read 128 contiguous bytes; 256 programs at T = 8192."""


def linear_lse_logps(
    hidden: torch.Tensor,  # [T, D], last dimension contiguous
    weight: torch.Tensor,  # [V, D], last dimension contiguous, the same dtype
    labels: torch.Tensor,  # [T] int64
    *,
    bias: torch.Tensor | None = None,  # [V]
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Log-probs [T] float32 of `labels` under softmax(z), 0 where the label is `ignore_index`.

    z = softcap * tanh((h W^T + bias) / softcap) / temperature, accumulated in fp32 from bf16, fp16
    or fp32 inputs (fp32 without TF32). Extra memory: 8 bytes per row and tile.
    Raises ValueError for CPU tensors outside Triton's interpreter.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    logps = torch.empty(T, dtype=torch.float32, device=hidden.device)
    if T == 0:
        return logps
    plain = bias is None and softcap is None
    with launching_on(hidden):
        tile = linear_tile(hidden.dtype, plain=plain, large=is_large(hidden.device))
        n_v = triton.cdiv(V, tile.BV)
        maxima, sums = (
            torch.empty(n_v, T, dtype=torch.float32, device=hidden.device) for _ in range(2)
        )
        label_logit = torch.empty(T, dtype=torch.float32, device=hidden.device)
        linear_lse_kernel[(triton.cdiv(T, tile.BT) * n_v,)](
            hidden,
            weight,
            weight if bias is None else bias,
            labels,
            maxima,
            sums,
            label_logit,
            T,
            V,
            D,
            hidden.stride(0),
            weight.stride(0),
            1.0 if softcap is None else softcap,
            1.0 / temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            EVEN_D=D % tile.BD == 0,
            PRECISION="ieee",
            BT=tile.BT,
            BV=tile.BV,
            BD=tile.BD,
            GROUP=GROUP,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        BN, BT = COMBINE_TILE
        combine_kernel[(triton.cdiv(T, BT),)](
            maxima,
            sums,
            label_logit,
            labels,
            logps,
            T,
            V,
            n_v,
            ignore_index,
            BN=BN,
            BT=BT,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return logps
