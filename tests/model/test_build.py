"""Tokenizer, images and checkpoints are deterministic and loadable by transformers and peft."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys

import pytest
import torch

from cpo_fast.data.lengths import Lengths, load_tokenizer
from cpo_fast.errors import RecordError, UsageError
from cpo_fast.model.adapters import merge
from cpo_fast.model.build import (
    add_lora,
    load_model,
    save_model,
    tiny_model,
)
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.tokenizer import SPECIAL_TOKENS, train_tokenizer
from cpo_fast.testing.samples import (
    CORPUS,
    image,
    images,
    text_model,
    tokenizer,
    vision_language_model,
)
from cpo_fast.types import ImageRef


def test_tokenizer_has_the_form_of_qwens(tmp_path):
    tok = tokenizer()
    size = len(tok)
    ids = tok.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(size - len(SPECIAL_TOKENS), size))
    assert (tok.eos_token, tok.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = "The heart is 12 mm — é.\n\n<think> a </think>  b"
    assert tok.decode(tok(text)["input_ids"]) == text
    assert len(tok("The heart is enlarged.")["input_ids"]) < 10  # merges were learned
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
    ]
    assert tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>Q<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(UsageError, match="vocab_size"):
        train_tokenizer(CORPUS, vocab_size=200)


def test_tokenizer_is_the_same_in_another_process(tmp_path):
    code = (
        "import sys, json; from cpo_fast.model.tokenizer import train_tokenizer;"
        "train_tokenizer(json.load(sys.stdin), vocab_size=420).save_pretrained(sys.argv[1])"
    )
    other, ours = tmp_path / "other", tmp_path / "ours"
    command = [sys.executable, "-c", code, str(other)]
    subprocess.run(command, input=json.dumps(CORPUS).encode(), check=True)
    tokenizer().save_pretrained(str(ours))
    for file in ours.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


@pytest.mark.parametrize("size", [(100, 80), (56, 56), (1000, 700), (30, 200), (2000, 20)])
def test_grid_of_the_header_equals_the_pixels(size):
    ref = image(*size)
    values, grid = images().pixels(ref)
    assert tuple(grid.tolist()) == images().grid(ref)
    assert values.shape == (int(grid.prod()), 1176) and values.dtype == torch.float32
    assert not (grid[1:] % 2).any()
    if max(size) < 50 * min(size):  # very thin images keep their aspect ratio
        assert grid[1] * grid[2] * 14 * 14 <= 112 * 112


def test_image_processor_round_trip(tmp_path):
    ImageProcessor.create(min_pixels=28 * 28 * 2, max_pixels=28 * 28 * 9).save(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["image_processor_type"] == "Qwen2VLImageProcessor"  # for AutoProcessor
    assert config["processor_class"] == "Qwen2_5_VLProcessor"
    loaded = ImageProcessor.load(tmp_path)
    assert loaded.grid(image(500, 500)) == (1, 6, 6)
    assert ImageProcessor.load(tmp_path, max_pixels=28 * 28 * 4).grid(image(500, 500)) == (1, 4, 4)
    with pytest.raises(UsageError, match="preprocessor_config"):
        ImageProcessor.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="max_pixels"):
        ImageProcessor.create(min_pixels=100, max_pixels=50)


OWN = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "rescale_factor": 1 / 128,
    "size": {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 9},
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"image_mean": 0.5, "image_std": 0.5},
        {"size": None, "min_pixels": 28 * 28, "max_pixels": 28 * 28 * 6},
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_checkpoint_preprocessing_equals_transformers(tmp_path, file, changed):
    """Bit-equal from either file, also after saving."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = {k: v for k, v in (OWN | changed).items() if v is not None}
    nested = {"image_processor": settings, "processor_class": "Qwen2_5_VLProcessor"}
    (tmp_path / file).write_text(json.dumps(settings if file.startswith("pre") else nested))
    ours = ImageProcessor.load(tmp_path)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(str(tmp_path))
    ours.save(tmp_path / "again")
    for size in ((300, 200), (60, 90)):
        ref = image(*size)
        want = theirs(Image.open(io.BytesIO(ref.data)).convert("RGB"), return_tensors="pt")
        for processor in (ours, ImageProcessor.load(tmp_path / "again")):
            values, grid = processor.pixels(ref)
            assert torch.equal(values, want["pixel_values"])
            assert grid.tolist() == want["image_grid_thw"][0].tolist()
    tokenizer().save_pretrained(str(tmp_path))
    lengths = Lengths.of_model(str(tmp_path))
    assert (
        lengths._images((image(300, 200),)) == int(ours.pixels(image(300, 200))[1].prod()) // 4 - 1
    )


def test_processor_config_precedes_preprocessor_config(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.1, 0.1]}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": OWN}))
    assert list(ImageProcessor.load(tmp_path).processor.image_mean) == OWN["image_mean"]
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_seq_len": 4}))
    assert list(ImageProcessor.load(tmp_path).processor.image_mean) == [0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resample": 2}, r"resample 2; only true and 3 \(bicubic\)"),
        ({"do_resize": False}, "do_resize False"),
        ({"patch_size": 16}, "patches of 16 pixels"),
        ({"merge_size": 4}, "merges 4 per side"),
        ({"image_std": [0.5, 0.5]}, "image_std .0.5, 0.5. .*three numbers"),
        ({"image_std": 0.0}, "image_std or rescale_factor"),
        ({"size": {"shortest_edge": 100, "longest_edge": 50}}, "min_pixels=100, max_pixels=50"),
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor is not supported"),
    ],
)
def test_unsupported_preprocessing_is_refused(tmp_path, changed, message):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(OWN | changed))
    with pytest.raises(UsageError, match=f"{file.name}: .*{message}"):
        ImageProcessor.load(tmp_path)


def test_configuration_decides_whether_images_are_read(tmp_path):
    """transformers 5 writes only processor_config.json; a tower needs one of both files."""
    model = vision_language_model()
    assert ImageProcessor.find(tmp_path, text_model().config) is None
    with pytest.raises(UsageError, match=r"no preprocessor_config.json or processor_config.json"):
        ImageProcessor.find(tmp_path, model.config)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": OWN}))
    found = ImageProcessor.find(tmp_path, model.config, max_pixels=28 * 28 * 4)
    assert list(found.processor.image_std) == OWN["image_std"]
    assert found.grid(image(500, 500)) == (1, 4, 4)
    model.config.vision_config.patch_size = 16
    with pytest.raises(UsageError, match="the vision tower has patch_size 16"):
        ImageProcessor.find(tmp_path, model.config)


def test_bad_images_are_record_errors():
    with pytest.raises(RecordError):
        images().grid(ImageRef("missing.png", root="/nonexistent"))
    with pytest.raises(RecordError):
        images().pixels(ImageRef("noise", data=b"not an image"))
    with pytest.raises(RecordError, match="too-thin"):
        images().grid(image(6000, 20))


def test_tiny_models_depend_only_on_the_seed():
    state = torch.random.get_rng_state()
    a, b, c = (tiny_model(tokenizer(), seed=seed, num_hidden_layers=1) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    with pytest.raises(UsageError, match="hidden_size"):
        tiny_model(tokenizer(), hidden_size=100, num_attention_heads=3)


def compute_logits(model):
    ids = torch.arange(300, 320)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("build", [vision_language_model, text_model])
def test_checkpoints_round_trip(build, tmp_path):
    """Whole model, adapter and merged model, loaded by cpo_fast, transformers and peft."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    model = build()
    plain = compute_logits(model)
    save_model(model, base, tokenizer=tokenizer(), images=images())
    assert stat.S_IMODE(base.stat().st_mode) == 0o700
    assert torch.equal(compute_logits(load_model(base)), plain)
    assert load_model(base, dtype=torch.bfloat16).dtype == torch.bfloat16

    tuned = add_lora(load_model(base), r=4)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    want = compute_logits(tuned)
    assert (want - plain).abs().max() > 0.01
    save_model(tuned, adapter, tokenizer=tokenizer(), images=images())
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        file.name for file in adapter.iterdir()
    }
    assert not [f for folder in (base, adapter) for f in folder.iterdir() if f.suffix == ".bin"]
    assert torch.equal(compute_logits(load_model(adapter)), want)
    kind = AutoModelForImageTextToText if hasattr(model.model, "visual") else AutoModelForCausalLM
    theirs = PeftModel.from_pretrained(kind.from_pretrained(str(base)), str(adapter))
    assert torch.equal(compute_logits(theirs), want)
    if kind is AutoModelForCausalLM:
        assert torch.equal(
            compute_logits(AutoPeftModelForCausalLM.from_pretrained(str(adapter))), want
        )

    whole = merge(tuned)
    save_model(whole, merged, tokenizer=tokenizer())
    torch.testing.assert_close(compute_logits(load_model(merged)), want, rtol=0, atol=1e-4)
    again = AutoTokenizer.from_pretrained(str(merged))
    assert again("The heart.")["input_ids"] == tokenizer()("The heart.")["input_ids"]
    assert load_tokenizer(adapter).chat_template == tokenizer().chat_template


def test_lora_adapts_the_linear_layers():
    def adapted(**options):
        model = add_lora(vision_language_model(), **options)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in name for name in names)
        return {name.split(".lora_")[0].removeprefix("base_model.model.") for name in names}

    frozen, whole = adapted(), adapted(freeze_vit=False)
    linears = {
        name
        for name, module in vision_language_model().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert whole == linears
    assert frozen == {name for name in linears if "visual" not in name}
    queries = adapted(target_modules=["q_proj"])
    assert queries and all(name.endswith("q_proj") for name in queries)
    for options in ({"r": 0}, {"target_modules": ["no_such_layer"]}):
        with pytest.raises(UsageError, match="lora_"):
            add_lora(vision_language_model(), **options)


def test_adapter_depends_on_its_seed():
    def first(seed):
        model = add_lora(text_model(), seed=seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))


def test_unloadable_folders_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UsageError, match="could be loaded"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(text_model().config.to_dict()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="safetensors"):
        load_model(tmp_path)
    with pytest.raises(UsageError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors"):
        load_model(tmp_path)
