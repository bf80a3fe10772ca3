"""The Triton kernels compiled ahead of time for sm_90: no GPU needed.

The tests compile what the launchers request: tiles from the kernels' own tables, arguments
specialised as by Triton's JIT. D and V are run-time arguments, so for D in (896, 2048, 3584) and V
in (151936, 152064, 32000, 50257) only divisibility by 16 matters: all except V = 50257 are
multiples of 16, and D is always a multiple of the 64-wide step. Rows of logits are padded to a
multiple of 64 for every V. T is not specialised.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from cpo_fast.kernels import (  # noqa: E402
    decoder_layer,
    lean_rows,
    reduction,
)
from tests.kernels.triton_binary import DTYPES, SHARED_LIMIT, Binary, compiled, loops  # noqa: E402


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        lean_rows.row_logps_(torch.zeros(2, 16), labels, 16, grad_rows=0)


def row_arguments(dtype: str, V: int) -> dict[str, str | int]:
    width = -(-V // 64) * 64
    return {
        "logits_ptr": f"*{dtype}",
        "bias_ptr": f"*{dtype}",
        "labels_ptr": "*i64",
        "logps_ptr": "*fp32",
        "row_stride": width,
        "V": V,
        "V_mem": width,
        "grad_rows": "i32",
        "softcap": "fp32",
        "inv_temperature": "fp32",
        "ignore_index": -100,
    }


def assert_rows_are_sound(binary: Binary, num_warps: int) -> None:
    assert binary.stack == 0 and binary.shared < SHARED_LIMIT
    assert binary.registers * 32 * num_warps <= 65_536
    # Logits travel 16 bytes a thread in both passes, ragged vocabularies included.
    wide = r"{}\.global\S*(\.v4\.b32|\.v8\.b16|\.v2\.b64)"
    assert len(re.findall(wide.format("ld"), binary.ptx)) >= 2
    assert len(re.findall(wide.format("st"), binary.ptx)) >= 1
    assert "mul.lo.s64" in binary.ptx or "mad.lo.s64" in binary.ptx  # row offsets of 64 bits


def lean_binary(
    dtype: str, V: int, folder: Path, *, bias: bool = False, softcap: bool = False
) -> tuple[Binary, int, int]:
    """The lean row kernel, the logits that a thread takes in a step, and its warps."""
    width = -(-V // 64) * 64
    itemsize = DTYPES[dtype].itemsize
    BR, BK, vectors, num_warps = lean_rows.lean_tile(width, itemsize, softcap=softcap)
    constants = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "BR": BR, "BK": BK, "VECTORS": vectors}
    binary = compiled(
        lean_rows.lean_rows_kernel,
        row_arguments(dtype, V) | {"c": "fp32"},
        constants,
        folder,
        num_warps=num_warps,
        maxnreg=lean_rows.most_registers(num_warps),
    )
    return binary, vectors * BR * BK // (32 * num_warps), num_warps


@pytest.mark.parametrize(
    ("dtype", "bias", "softcap", "V"),
    [
        ("bf16", False, False, 152_064),
        ("bf16", False, False, 50_257),
        ("bf16", True, False, 50_257),
        ("bf16", True, True, 50_257),
        ("fp16", False, False, 152_064),
        ("fp32", False, False, 50_257),
        ("fp32", True, True, 50_257),
    ],
)
def test_lean_row_kernel(dtype: str, bias: bool, softcap: bool, V: int, tmp_path: Path) -> None:
    binary, _, num_warps = lean_binary(dtype, V, tmp_path, bias=bias, softcap=softcap)
    assert_rows_are_sound(binary, num_warps)
    if not bias:
        # One program per multiprocessor, whose row stays in the L2 until the second pass.
        assert 2 * binary.registers * 32 * num_warps > 65_536


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lean_row_kernel_takes_few_instructions(dtype: str, tmp_path: Path) -> None:
    """Machine instructions per 16 logits: 110 for a reference row, which is read only, 200 for both
    passes of a policy row."""
    binary, logits, _ = lean_binary(dtype, 152_064, tmp_path)
    assert logits == 16
    # The main loops read 16 logits in two accesses; the loops over the ragged end read 8 in one.
    main = [loop for loop in loops(binary.sass) if loop.count("LDG") == 2]
    (read,) = (loop for loop in main if loop.count("STG") == 0)
    (write,) = (loop for loop in main if loop.count("STG") == 2)
    assert read.count("MUFU.EX2") == 17 and write.count("MUFU.EX2") == 16
    assert len(read) <= 110 and len(read) + len(write) <= 200
    # The only select in the loops guards against an offset of -inf.
    assert read.count("FSEL") <= 1 and write.count("FSEL") == 0


@pytest.mark.parametrize("n", [48, 7, 1])
def test_reductions(n: int, tmp_path: Path) -> None:
    block = {"BLOCK": reduction.BLOCK}
    for kernel, arguments in (
        (
            reduction.segment_sums_kernel,
            {
                "logps_ptr": "*fp32",
                "segment_ids_ptr": "*i64",
                "labels_ptr": "*i64",
                "sums_ptr": "*fp64",
                "counts_ptr": "*i32",
                "T": n,
                "ignore_index": -100,
            },
        ),
        (
            reduction.row_scale_kernel,
            {
                "rows_ptr": "*bf16",
                "coefficients_ptr": "*fp32",
                "out_ptr": "*bf16",
                "D": n,
                "rows_stride": n,
                "out_stride": n,
            },
        ),
    ):
        binary = compiled(kernel, arguments, block, tmp_path, num_warps=4)
        assert binary.stack == 0 and "atom." not in binary.ptx and "red.global" not in binary.ptx


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_swiglu_kernels(dtype: str, tmp_path: Path) -> None:
    for kernel in (decoder_layer.swiglu_kernel, decoder_layer.swiglu_backward_kernel):
        tensors = [name for name in kernel.arg_names if name.endswith("_ptr")]
        arguments: dict[str, str | int] = dict.fromkeys(tensors, f"*{dtype}") | {"N": 16}
        constants = {"BLOCK": decoder_layer.BLOCK}
        binary = compiled(kernel, arguments, constants, tmp_path, num_warps=4)
        assert binary.stack == 0 and "v4.b32" in binary.ptx, "16 bytes a thread"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("heads", "size"), [(28, 128), (4, 128), (16, 80)])
def test_rotate_kernel(heads: int, size: int, backward: bool, tmp_path: Path) -> None:
    binary = compiled(
        decoder_layer.rotate_kernel,
        {
            **dict.fromkeys(("x_ptr", "out_ptr"), "*bf16"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            **{"row_stride": heads * size, "head_stride": size, "H": heads},
        },
        {
            "HALF": size // 2,
            "HEADS": triton.next_power_of_2(heads),
            "WIDTH": triton.next_power_of_2(size // 2),
            "BACKWARD": backward,
        },
        tmp_path,
        num_warps=4,
    )
    assert binary.stack == 0 and binary.shared < SHARED_LIMIT
