"""Checks of the CUDA kernels without a GPU, from nvcc's report and the machine code."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels.cuda_places import VARIANTS

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = ("row_kernel", "linear_lse", "reduction")
REGISTERS = 65536  # of a multiprocessor
STATIC_SHARED = 1024  # bytes; test_cuda_index.py keeps 2048 free beside the dynamic part


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled as far as it matters: the mangled name
    threads: int
    registers: int
    shared: int
    stack: int
    spills: int
    sass: str


THREADS = {
    "row_portable": 1024,
    "row_cluster": 1024,
    "linear_kernel": 384,
    "combine": 256,
    "segment_sums": 256,
    "row_scale": 256,
}


def disassembler() -> str | None:
    """nvdisasm of the toolkit, or the one inside triton's wheel."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(bundled) if bundled.exists() else None


def compile_cubin(source: str, arch: str, folder: Path, *macros: str) -> tuple[Path, str]:
    cubin = folder / f"{source}_{arch}.cubin"
    command = ["nvcc", "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", *macros]
    command += ["-cubin", "-Xptxas", "-v", str(CSRC / f"{source}.cu"), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return cubin, result.stderr


def parse(report: str, sass: str) -> list[Kernel]:
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
    found = []
    for block in report.split("Compiling entry function '")[1:]:
        name = block[: block.index("'")]
        threads = next(count for key, count in THREADS.items() if key in name)

        def number(pattern: str, block: str = block) -> int:
            match = re.search(pattern, block)
            return int(match[1]) if match else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        found.append(
            Kernel(
                name,
                threads,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
                spills,
                code[name],
            )
        )
    return found


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Kernel], str]:
    """All kernels compiled for sm_90a, and the compiler's messages."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the CUDA kernels cannot be compiled")
    tool = disassembler()
    if tool is None:
        pytest.skip("no nvdisasm, neither of a CUDA toolkit nor in triton: no machine code to read")
    folder = tmp_path_factory.mktemp("cubin")
    kernels, messages = [], ""
    for source in SOURCES:
        cubin, report = compile_cubin(source, "90a", folder)
        sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
        kernels += parse(report, sass.stdout)
        messages += report
    return kernels, messages


@dataclass(frozen=True)
class Loop:
    """An innermost loop over 16-byte vectors of a row with exponentials, as a warp runs it."""

    instructions: int
    vectors: int  # per iteration
    stores: bool

    @property
    def per_16_elements(self) -> float:
        return self.instructions / (8 * self.vectors) * 16


def row_loops(sass: str) -> list[Loop]:
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    jumps = [
        (i, labels[target[1]])
        for i, text in enumerate(code)
        if "BRA" in text and (target := re.search(r"`\((\.L_\w+)\)", text))
    ]
    spans = [(end, i + 1) for i, end in jumps if end <= i]  # first instruction, one past the last
    spans = [s for s in spans if any("MUFU.EX2" in text for text in code[slice(*s)])]
    inner = [
        (a, b)
        for a, b in spans
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]
    found = []
    for start, stop in inner:
        # Run by the thread that refills the pieces only; other warps jump over it.
        skipped: set[int] = set()
        for i, target in jumps:
            if start <= i < target <= stop and code[i].startswith("@"):
                block = range(i + 1, target)
                if any("UBLKCP" in code[j] for j in block):
                    skipped |= set(block)
        body = [code[i] for i in range(start, stop) if i not in skipped]
        vectors = sum(bool(re.search(r"\b(LDG\.E|LDS)\.128", text)) for text in body)
        found.append(Loop(len(body), vectors, any("STG.E.128" in text for text in body)))
    return [loop for loop in found if loop.vectors]


def named(kernels: list[Kernel], part: str) -> list[Kernel]:
    found = [kernel for kernel in kernels if part in kernel.name]
    assert found, part
    return found


@pytest.mark.complete
def test_nothing_spills(hopper: tuple[list[Kernel], str]) -> None:
    kernels, messages = hopper
    assert len(kernels) == 16
    for kernel in kernels:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel.name
        assert not re.search(r"\b(LDL|STL)\b", kernel.sass), kernel.name
    # Warnings such as serialised wgmma or an ignored setmaxnreg.
    assert "warning" not in messages.lower() and "Potential Performance Loss" not in messages


@pytest.mark.complete
def test_registers_and_shared_memory_fit(hopper: tuple[list[Kernel], str]) -> None:
    for kernel in hopper[0]:
        assert 0 < kernel.registers <= REGISTERS // kernel.threads, kernel.name
        assert kernel.shared <= STATIC_SHARED * (3 if "segment_sums" in kernel.name else 1)


@pytest.mark.complete
def test_linear_kernel_uses_the_tensor_cores_and_the_copy_engine(
    hopper: tuple[list[Kernel], str],
) -> None:
    for kernel in named(hopper[0], "linear_kernel"):
        assert "HGMMA.64x256x16.F32" in kernel.sass
        assert "HMMA" not in kernel.sass.replace("HGMMA", "")
        assert kernel.sass.count("USETMAXREG") == 2
        assert "UTMALDG.2D.MULTICAST" in kernel.sass
        # The accumulators stay in one place: moving them would take 128 moves.
        loops = kernel.sass.split("HGMMA")[1:-1]
        assert max(part.count("MOV ") for part in loops if part.count("\n") < 100) < 32
        # Memory barriers only at the two cluster barriers, none in the main loop.
        assert kernel.sass.count("MEMBAR.ALL.GPU") <= 2


@pytest.mark.complete
def test_register_pool_covers_what_the_warpgroups_ask_for(
    hopper: tuple[list[Kernel], str],
) -> None:
    """setmaxnreg.inc waits forever if the register pool at launch is too small."""
    source = (CSRC / "linear_lse.cu").read_text()
    asked = {
        name: int(re.search(rf"constexpr int k{name}Registers = (\d+);", source)[1])  # type: ignore[index]
        for name in ("Producer", "Consumer")
    }
    assert all(24 <= count <= 256 and count % 8 == 0 for count in asked.values())
    for kernel in named(hopper[0], "linear_kernel"):
        at_launch = -(-kernel.registers // 8) * 8
        assert 128 * asked["Producer"] + 256 * asked["Consumer"] <= at_launch * kernel.threads
        assert at_launch * kernel.threads <= REGISTERS


@pytest.mark.complete
def test_row_kernel_copies_in_bulk_and_sends_to_its_peer(hopper: tuple[list[Kernel], str]) -> None:
    for kernel in named(hopper[0], "row_cluster"):
        assert "UBLKCP" in kernel.sass
        assert "STAS" in kernel.sass  # st.async
        assert kernel.sass.count("MEMBAR.ALL.GPU") <= 2
    for kernel in named(hopper[0], "row_portable"):
        assert "LDG.E.128" in kernel.sass and "STG.E.128" in kernel.sass


# Slightly above nvcc 13.0: 81.5 and 78.5 in row_portable, 97 and 92 in row_cluster. With
# three times as many these kernels waited for instructions instead of memory.
INSTRUCTIONS = {"row_portable": (90, 90), "row_cluster": (106, 98)}


@pytest.mark.complete
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_row_kernels_take_few_instructions(hopper: tuple[list[Kernel], str], name: str) -> None:
    """Per 16 elements of a plain bfloat16 row: the pass that reads, and that of the gradient."""
    (kernel,) = [k for k in named(hopper[0], name) if "bfloat16Lb0" in k.name]
    loops = row_loops(kernel.sass)
    # The main loop of a pass takes the most vectors at once; the others take what is left over.
    read, write = (
        max((loop for loop in loops if loop.stores == stores), key=lambda loop: loop.vectors)
        for stores in (False, True)
    )
    assert read.vectors >= 2 and write.vectors >= 2
    most_read, most_write = INSTRUCTIONS[name]
    assert 64 < read.per_16_elements <= most_read, read
    assert 64 < write.per_16_elements <= most_write, write


@pytest.mark.complete
def test_exponentials_of_the_sum_serve_for_e(hopper: tuple[list[Kernel], str]) -> None:
    """128 per tile and thread, and one factor per row: as many with E as without."""
    kernels = [k for k in named(hopper[0], "linear_kernel") if "bfloat16" in k.name]
    sums, both, redone = sorted(kernels, key=lambda k: re.search(r"MakeE(\d)", k.name)[1])  # type: ignore[index]
    counts = [kernel.sass.count("MUFU.EX2") for kernel in (sums, both, redone)]
    assert counts[1] <= counts[0] + 8, counts
    assert counts[0] >= counts[2] >= 128


@pytest.mark.complete
@pytest.mark.parametrize("macros", VARIANTS, ids=" ".join)
def test_variants_for_tuning_compile(macros: tuple[str, ...], tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the CUDA kernels cannot be compiled")
    _, report = compile_cubin("linear_lse", "90a", tmp_path, *macros)
    assert "warning" not in report.lower()
    assert not re.search(r"[1-9]\d* bytes (spill|stack frame)", report)


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for_sm_80(source: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the CUDA kernels cannot be compiled")
    _, report = compile_cubin(source, "80", tmp_path)
    assert "warning" not in report
    assert not re.search(r"[1-9]\d* bytes (spill|stack frame)", report)
