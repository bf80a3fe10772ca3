"""Every attention implementation over a pack, and the vision tower, compared with float32.

A small Qwen2.5-VL with random weights and LoRA on both parts; three studies with images of
different sizes and two or three answers each. The bound on errors of hidden states (policy and
reference) and LoRA gradients is 1.5 times the error of the dense mask ("sdpa") with transformers'
own window attention in the same precision, plus 1e-3. A CPU runs in float32 with a bound of 1e-4.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import ATTENTION_CHECK
from bench.gpu.steps import IMPORTS, is_missing
from bench.gpu.units import NotHere, Setting, Unit

STUDIES = ((168, 224, 2), (280, 196, 1), (84, 112, 2))  # width, height, rejected answers
CPU_ERROR = 1e-4
NAMES = ("auto", "gathered", "varlen", "flex")
FUSED, COMPILED = "auto, fused", "auto, compiled"
OPTIONS: dict[str, dict[str, Any]] = {FUSED: {"fused": True}, COMPILED: {"compile": True}}
LIMIT, FLEX_LIMIT, COMPILING_LIMIT = 25.0, 40.0, 150.0


@dataclass(frozen=True)
class Prepared:
    model: Any  # with LoRA, in the device's precision
    batch: Any
    truth: dict[str, Tensor]
    allowed: dict[str, float]
    plain: dict[str, float]  # errors of "sdpa" in the same precision


def build_adapted_model(device: torch.device, dtype: torch.dtype) -> Any:
    """A model whose weights give non-uniform attention, with a non-zero LoRA."""
    from bench.step_data import train_word_tokenizer
    from bench.step_sizes import Size, build_random_model
    from cpo_fast.model.build import add_lora

    size = Size(512, 2, 4, 2, 1024, 4608, False, 320, 4, 4, 640)
    base = build_random_model(size, train_word_tokenizer(), device, dtype)
    model = add_lora(base, r=8, alpha=32, freeze_vit=False)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "lora_A" in name:
            continue
        values = torch.randn(parameter.shape, generator=generator)
        scale = 0.02 if "lora_B" in name else parameter[0].numel() ** -0.5
        parameter.data.copy_(values * scale)
    return model.train()


def build_pack(device: torch.device) -> Any:
    """A PackedBatch of all STUDIES."""
    from bench.step_data import make_preference, train_word_tokenizer
    from cpo_fast.model.images import ImageProcessor
    from cpo_fast.packing import collate, encode_all, image_token_id
    from cpo_fast.testing.samples import image

    rng = random.Random(0)
    words: dict[str, Any] = {"prompt_words": 20, "response_words": (15, 60)}
    samples = [
        make_preference(str(i), rng, (image(width, height, i),), rejected=rejected, **words)
        for i, (width, height, rejected) in enumerate(STUDIES)
    ]
    images = ImageProcessor.create(max_pixels=504**2)
    tokenizer = train_word_tokenizer()
    groups = encode_all(samples, tokenizer, images.grid, max_length=4096).groups
    parts = tuple((i, tuple(range(len(group.rejected)))) for i, group in enumerate(groups))
    pad = image_token_id(tokenizer)
    return collate(groups, parts, pixels=images.pixels, image_token_id=pad).to(device)


def compute_outputs(
    model: Any, batch: Any, *, own_windows: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Hidden states and gradients of a copy of the model with PackedModel's `options`; with
    `own_windows` its vision tower uses transformers' window attention."""
    from cpo_fast.model.packed import PackedModel

    packed = PackedModel(copy.deepcopy(model), **options)
    if own_windows:
        packed.vision.config._attn_implementation = "sdpa"
    hidden = packed.hidden(batch)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    trained = {n: p for n, p in packed.model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((hidden.float() * weights).sum(), list(trained.values()))
    parts: dict[str, list[Tensor]] = {"gradient, language": [], "gradient, vision": []}
    for name, grad in zip(trained, grads, strict=True):
        part = "vision" if ".visual." in name else "language"
        parts[f"gradient, {part}"].append(grad.double().flatten())
    return {
        "hidden": hidden.detach().double(),
        "hidden, reference": packed.hidden(batch, reference=True).double(),
        **{name: torch.cat(found) for name, found in parts.items()},
    }


def compare(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name] - x).norm() / x.norm()) for name, x in truth.items()}


@contextlib.contextmanager
def disable_tf32() -> Iterator[None]:
    """Disables TF32, the default of convolutions."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@functools.lru_cache(maxsize=1)
def prepare(device: str) -> Prepared:
    where = torch.device(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, batch = build_adapted_model(where, dtype), build_pack(where)
    plain: dict[str, Any] = {"attention": "sdpa", "own_windows": True}
    with disable_tf32():
        truth = compute_outputs(copy.deepcopy(model).float(), batch, **plain)
    if device == "cpu":
        return Prepared(model, batch, truth, dict.fromkeys(truth, CPU_ERROR), {})
    errors = compare(compute_outputs(model, batch, **plain), truth)
    allowed = {name: 1.5 * error + 1e-3 for name, error in errors.items()}
    return Prepared(model, batch, truth, allowed, errors)


def check(name: str, device: str, quick: bool) -> dict[str, Any]:
    """Compare the attention `name` of NAMES or OPTIONS with float32; "auto" is PackedModel's
    default."""
    if is_missing("peft"):
        raise NotHere("peft is not installed")
    if name == COMPILED and quick:
        raise NotHere("compilation takes too long on a CPU")
    from cpo_fast.errors import UsageError
    from cpo_fast.model.fused import restore_functions
    from cpo_fast.model.packed import check_attention

    if name == FUSED and device == "cpu":
        raise NotHere("fused layers need CUDA and half precision")
    options = OPTIONS.get(name, {})
    if name != "auto" and not options:
        options = {"attention": name}
        try:
            check_attention(name, device, torch.bfloat16 if device == "cuda" else torch.float32)
        except UsageError as reason:
            raise NotHere(str(reason)) from None
    known = prepare(device)
    try:
        errors = compare(compute_outputs(known.model, known.batch, **options), known.truth)
    finally:
        restore_functions()  # for later checks in this process
    for what, error in errors.items():
        allowed = known.allowed[what]
        assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"
    return {"errors": errors, "errors_of_sdpa": known.plain}


def list_units(setting: Setting) -> list[Unit]:
    """The default first, the compiled model last: compilation takes over 40 s on an H200."""
    checks = [
        Unit(
            ATTENTION_CHECK.format(name),
            functools.partial(check, name, setting.device, setting.quick),
            {"flex": FLEX_LIMIT, COMPILED: COMPILING_LIMIT}.get(name, LIMIT),
            variant=f"attention {name}",
            phase="correctness",
        )
        for name in (*NAMES[:1], FUSED, *NAMES[1:], COMPILED)
    ]
    return [IMPORTS, *checks]


def list_plan_units(setting: Setting) -> list[Unit]:
    """All except the compiled model."""
    return list_units(setting)[:-1]


def list_default_units(setting: Setting) -> list[Unit]:
    """The default, without and with fused layers."""
    return list_units(setting)[:3]
