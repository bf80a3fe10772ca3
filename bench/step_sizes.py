"""A training step at real sizes with random weights: `python -m bench.step_sizes --size 7B`.

LoRA r 8 on the language model's linears, frozen tower, on-line reference, CCF-like pairs with one
image of 324 visual tokens. Speed, memory and MFU equal a real run's: random weights cost as much as
trained ones. The tokenizer has 4,096 entries, the model the real vocabulary. MFU relates model
FLOPs (cpo_fast/model/flops.py) to the data sheet's dense bfloat16 peak, on a CPU to a square matrix
product measured in the same process. Intended for a GPU; docs/gpu.md has measurements.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.units import describe_error
from bench.measure import measure_extra_memory
from bench.packed_step import Mode, PackedStep
from bench.step_data import VISUAL_504, Work, make_work
from bench.trl_step import TrlStep
from cpo_fast.model.build import add_lora
from cpo_fast.model.flops import mfu, peak_flops
from cpo_fast.model.fused import restore_functions
from cpo_fast.model.packed import PackedModel
from cpo_fast.model.tokenizer import SPECIAL_TOKENS
from cpo_fast.types import IMAGE_TOKEN


@dataclass(frozen=True)
class Size:
    """Sizes of a Qwen2.5-VL; 3B and 7B as in the published config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    vision_hidden: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    vision_intermediate: int = 3420


SIZES = {
    "tiny": Size(64, 2, 4, 2, 96, 4608, False, 64, 2, 4, 128),
    "3B": Size(2048, 36, 16, 2, 11008, 151936, True),
    "7B": Size(3584, 28, 28, 4, 18944, 152064, False),
}
PEERS = ("unshared", "unpacked", "gathered", "sdpa", "varlen", "flex", "trl")


def build_random_model(size: Size, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2_5_VLForConditionalGeneration of this size, initialised on the device."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = size.hidden // size.heads // 2
    side = half * 3 // 8  # the published sizes split 64 into 16 + 24 + 24
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "intermediate_size": size.intermediate,
            "vocab_size": size.vocabulary,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [half - 2 * side, side, side],
            },
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "num_heads": size.vision_heads,
            "intermediate_size": size.vision_intermediate,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [
                i for i in range(size.vision_layers) if i % 8 == 7 or i == size.vision_layers - 1
            ],
        },
        image_token_id=ids[IMAGE_TOKEN],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=size.tied,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def run(
    size: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    studies: int = 16,
    packing_length: int = 8192,
    gradient_checkpointing: bool = False,
    peers: tuple[str, ...] = ("unshared",),
    loss_impl: str | None = None,
    trl_batch: int = 4,
    rounds: int = 3,
    side: int = VISUAL_504,
    with_ours: bool = True,
    compile: bool = False,
    fused: bool = False,
    on_measured: Callable[[str, Callable[[], float]], None] | None = None,
) -> dict[str, Any]:
    """Figures of one optimiser step over 2 x `studies` pairs, ready for JSON.

    `size` is one of SIZES. `device` defaults to "cuda" if available, `dtype` to bfloat16 there and
    float32 on a CPU. `peers` are "unshared" (the prompt recomputed for every pair), "unpacked" (one
    study at a time), another attention implementation, or "trl" (DPOTrainer's step in micro-batches
    of `trl_batch` pairs). Steps run one after another, as two models may not fit in memory; ours is
    first, and is left out without `with_ours`. `compile` compiles the decoder layers of all steps
    except trl's; `fused` is passed to PackedModel. `on_measured(name, step)` is called after each.
    Each step has an entry under `steps`, ours under "ours", with `pairs_per_second`, `seconds`,
    `peak_memory_bytes` and `loss` (mean loss, about 0.6931 for an untrained model); our steps also
    have `physical_tokens_per_second`, `mfu` and `time_shares`. A peer that fails (out of memory,
    not installed) has `error` instead. Raises ValueError for an unknown size or peer.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: use {', '.join(SIZES)}")
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}: use {', '.join(PEERS)}")
    data = make_work(studies=studies, side=side, prompt_words=40)
    peak = peak_flops(where, dtype)

    def build_model() -> Any:
        return build_random_model(SIZES[size], data.tokenizer, where, dtype)

    def build_ours(attention: str, mode: Mode = "shared") -> PackedStep:
        model = add_lora(build_model(), r=8, alpha=32)
        model.train()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        packed = PackedModel(model, attention=attention, compile=compile, fused=fused)
        return PackedStep(
            packed, data, packing_length=packing_length, mode=mode, loss_impl=loss_impl
        )

    used = attention
    steps: dict[str, dict[str, Any]] = {}
    for name in (*(("ours",) if with_ours else ()), *peers):
        try:
            with ExitStack() as stack:
                restore_functions()  # the previous step can have installed fused ones
                if name == "trl":
                    folder = stack.enter_context(tempfile.TemporaryDirectory())
                    step: Callable[[], float] = TrlStep(
                        build_model(),
                        data,
                        folder=folder,
                        batch=trl_batch,
                        use_cpu=where.type == "cpu",
                        bf16=dtype == torch.bfloat16,
                        gradient_checkpointing=gradient_checkpointing,
                    )
                elif name in ("unshared", "unpacked"):
                    step = build_ours(attention, name)
                else:
                    step = build_ours(attention if name == "ours" else name)
                    used = step.packed.attention if name == "ours" else used
                steps[name] = _measure(step, data, where, rounds, peak)
                if on_measured is not None:
                    on_measured(name, step)
                del step
        except Exception as error:  # a peer's failure is a result, our failure an error
            if name == "ours":
                raise
            steps[name] = {"error": describe_error(error)}
        if where.type == "cuda":
            torch.cuda.empty_cache()
    for name, figures in steps.items():
        if with_ours and name != "ours" and "error" not in figures:
            mine = steps["ours"]["pairs_per_second"]
            figures["ours_is_faster_by"] = mine / figures["pairs_per_second"]
    return {
        "size": size,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": used,
        "compiled": compile,
        "pairs": data.pairs,
        "packing_length": packing_length,
        "gradient_checkpointing": gradient_checkpointing,
        "logical_tokens": data.logical_tokens,
        "peak_flops": peak,
        "mfu_convention": "model FLOPs: 4 N per token with LoRA + 2 N for the reference, attention "
        "by visible pairs, recomputation not counted",
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")
        },
        "steps": steps,
    }


def _measure(
    step: Callable[[], float], data: Work, device: torch.device, rounds: int, peak: float
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    loss = step()  # warms up
    memory: int | None = None
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        memory = measure_extra_memory(step)
    seconds = []
    for _ in range(rounds):
        if cuda:
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    if cuda:
        memory = torch.cuda.max_memory_allocated(device)
    median = statistics.median(seconds)
    figures: dict[str, Any] = {
        "loss": loss,
        "seconds": median,
        "seconds_of_rounds": seconds,
        "pairs_per_second": data.pairs / median,
        "logical_tokens_per_second": data.logical_tokens / median,
        "peak_memory_bytes": memory,
    }
    if isinstance(step, PackedStep):
        step.clear()
        clocked, step.phases.on = step.phases.on, True
        step()
        step.phases.on = clocked
        figures |= {
            "packs": len(step.packs),
            "physical_tokens": step.tokens,
            "physical_tokens_per_second": step.tokens / median,
            "token_ratio": data.logical_tokens / step.tokens,
            "flops_per_token": step.flops / step.tokens,
            "mfu": mfu(step.flops, median, peak),
            "time_shares": step.phases.compute_shares(),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--device")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--studies", type=int, default=16, help="two pairs each")
    parser.add_argument("--packing_length", type=int, default=8192)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="the decoder layers")
    parser.add_argument("--peers", nargs="*", default=["unshared"], choices=PEERS)
    parser.add_argument("--loss_impl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = vars(parser.parse_args())
    output = args.pop("output")
    text = json.dumps(run(**{**args, "peers": tuple(args["peers"])}), indent=1)
    print(text)
    if output:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
