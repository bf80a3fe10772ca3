"""A merged model loads in transformers and equals the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpo_fast.export import main
from cpo_fast.model.build import add_lora, load_model, save_model, tiny_model, tiny_text_model
from cpo_fast.testing import samples


def adapter(folder: Path, *, sees: bool, dtype: torch.dtype = torch.float32) -> Path:
    """Checkpoints of a base and of an adapter with random B."""
    make = tiny_model if sees else tiny_text_model
    base = make(samples.tokenizer(), hidden_size=64, num_hidden_layers=2, intermediate_size=96)
    images = samples.images() if sees else None
    save_model(base.to(dtype), folder / "base", tokenizer=samples.tokenizer(), images=images)
    model = add_lora(load_model(folder / "base", dtype=torch.float32), r=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_model(model, folder / "adapter", tokenizer=samples.tokenizer(), images=images)
    return folder / "adapter"


@pytest.mark.parametrize("sees", [False, True])
def test_merged_model_equals_the_adapter(tmp_path: Path, sees: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    checkpoint, merged = adapter(tmp_path, sees=sees), tmp_path / "merged"
    assert main(["--merge", str(checkpoint), "--output_dir", str(merged)]) == 0
    assert not (merged / "adapter_config.json").exists()
    assert merged.stat().st_mode & 0o777 == 0o700
    assert (merged / "preprocessor_config.json").is_file() == sees
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    ids = AutoTokenizer.from_pretrained(merged)("The heart is enlarged.", return_tensors="pt")
    with torch.no_grad():
        whole = kind.from_pretrained(merged).eval()(input_ids=ids.input_ids).logits
        tuned = load_model(checkpoint).eval()
        expected = tuned(input_ids=ids.input_ids).logits
        with tuned.disable_adapter():
            untuned = tuned(input_ids=ids.input_ids).logits
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
    assert (whole - untuned).abs().max() > 1e-3


def test_default_dtype_is_that_of_the_base(tmp_path: Path) -> None:
    checkpoint = adapter(tmp_path, sees=False, dtype=torch.bfloat16)
    assert main(["--merge", str(checkpoint), "--output_dir", str(tmp_path / "a")]) == 0
    assert load_model(tmp_path / "a").dtype == torch.bfloat16
    flags = ["--merge", str(checkpoint), "--output_dir", str(tmp_path / "b"), "--dtype", "float32"]
    assert main(flags) == 0
    assert load_model(tmp_path / "b").dtype == torch.float32


def test_unmergeable_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = adapter(tmp_path, sees=False)
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["--merge", str(tmp_path / "base"), *out]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err
    assert main(["--merge", str(checkpoint), "--output_dir", str(tmp_path / "base")]) == 2
    assert "not empty" in capsys.readouterr().err
    (checkpoint / "manifest.json").write_text('{"adapter_model.safetensors": "0"}')
    assert main(["--merge", str(checkpoint), *out]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
