"""Triton kernels compiled ahead of time, without the device, and their machine code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = 227 * 1024  # bytes that one block may have on sm_90
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Binary(NamedTuple):
    ptx: str
    sass: str
    registers: int
    stack: int  # bytes of local memory a thread, where spilled registers go
    shared: int


class Loop(list[str]):
    """The instructions from a branch's target to the branch."""

    def count(self, part: str) -> int:  # type: ignore[override]
        return sum(part in instruction for instruction in self)


def tool(name: str, *arguments: str | Path) -> str:
    """The output of a tool of Triton's CUDA toolkit."""
    path = next(Path(triton.__file__).parent.glob(f"backends/nvidia/bin/{name}"))
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def compiled(
    kernel: Any,
    arguments: Mapping[str, str | int],
    constants: Mapping[str, Any],
    folder: Path,
    *,
    num_warps: int,
    num_stages: int = 3,
    capability: int = 90,
    maxnreg: int | None = None,
) -> Binary:
    """`arguments` maps a name to its type, or to the value that decides how it is specialised."""
    signature, constexprs, attributes = {}, dict(constants), {}
    for index, name in enumerate(kernel.arg_names):
        kind = arguments.get(name, "constexpr")
        if isinstance(kind, int) and kind == 1:
            constexprs[name], kind = 1, "constexpr"
        elif isinstance(kind, int):
            if kind % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
            kind = "i32"
        elif kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
        signature[name] = kind
    assert set(constexprs) == {name for name, kind in signature.items() if kind == "constexpr"}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    binary = triton.compile(
        ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options | ({} if maxnreg is None else {"maxnreg": maxnreg}),
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    report = tool("cuobjdump", "-res-usage", cubin)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Binary(
        binary.asm["ptx"],
        tool("nvdisasm", "-c", cubin),
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        binary.metadata.shared,
    )


def loops(sass: str) -> list[Loop]:
    """The loops without a loop inside them, in the order of the code."""
    instructions: list[str] = []
    places: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1])
    found: list[tuple[int, int]] = []
    for end, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if branch and places.get(branch[1], end) < end:
            begin = places[branch[1]]
            if not any(begin <= inner for inner, _ in found if inner >= begin):
                found.append((begin, end))
    return [Loop(instructions[begin : end + 1]) for begin, end in found]
