"""Model paths of users: models, stages, adapters, missing folders."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast.errors import UsageError
from cpo_fast.evaluate import open_model
from cpo_fast.evaluate_options import parse_arguments as evaluate_arguments
from cpo_fast.evaluate_options import resolve_model
from cpo_fast.export import main as export
from cpo_fast.model.build import add_lora, load_model, save_model
from cpo_fast.run.context import RunContext
from cpo_fast.run.corpus import Texts
from cpo_fast.run.find_checkpoint import find_checkpoint
from cpo_fast.run.stages import find_sft_result
from cpo_fast.run.start import find_start, open_start
from cpo_fast.testing import samples
from cpo_fast.testing.runs import parse_arguments
from cpo_fast.train import main, prepare_run
from cpo_fast.training.checkpoint import find_damage, write_checkpoint
from cpo_fast.training.distributed import World

TOKENS = torch.arange(300, 320)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().float()(input_ids=TOKENS).logits


def write_adapter(folder: Path, base: Path, *, seed: int = 0, tokenizer: bool = True) -> Path:
    """An adapter with random B whose adapter_config.json names `base` by a relative path."""
    model = add_lora(load_model(base, dtype=torch.float32), r=4, alpha=8)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_model(model, folder, tokenizer=samples.tokenizer() if tokenizer else None)
    file = folder / "adapter_config.json"
    named = {"base_model_name_or_path": f"../{base.name}"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(samples.text_model(), tmp_path / "base", tokenizer=samples.tokenizer())
    return tmp_path / "base"


def start(tmp_path: Path, *flags: str) -> Any:
    args = parse_arguments(["--dataset", "d", "--output_dir", str(tmp_path / "out"), *flags])
    args.overwrite_output_dir = True
    return open_start(RunContext(args, World()), Texts({}, {}), find_start(args))


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--sft_checkpoint"])
def test_starting_adapter_is_merged_into_its_base(flag: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, tokenizer=False)
    want = logits(load_model(adapter))
    flags = ["--stages", "cpo", flag, str(adapter)]
    found = start(tmp_path, *flags)
    assert found.path == tmp_path / "out" / "start" and found.images is None
    merged = load_model(found.path)
    assert merged.dtype == torch.float32 and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-5)
    assert found.tokenizer.get_vocab() == samples.tokenizer().get_vocab()  # of the base
    written = (found.path / "model.safetensors").stat().st_mtime_ns
    assert start(tmp_path, *flags).path == found.path
    assert (found.path / "model.safetensors").stat().st_mtime_ns == written  # reused
    write_adapter(adapter, base, seed=1)
    other = load_model(start(tmp_path, *flags).path)
    torch.testing.assert_close(logits(other), logits(load_model(adapter)), rtol=0, atol=1e-5)
    assert load_model(start(tmp_path, *flags, "--bf16").path).dtype == torch.bfloat16


def test_adapter_uses_the_image_processor_of_its_base(tmp_path: Path) -> None:
    base, flags = tmp_path / "base", ["--stages", "cpo", "--model_name_or_path"]
    images = samples.images()
    save_model(samples.vision_language_model(), base, tokenizer=samples.tokenizer(), images=images)
    adapter = write_adapter(tmp_path / "adapter", base)
    found = start(tmp_path, *flags, str(adapter))
    assert found.images is not None and (found.path / "preprocessor_config.json").is_file()
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=f"no preprocessor_config.json .* in {base}"):
        start(tmp_path, *flags, str(base))


def stage(folder: Path, base: Path) -> Path:
    """runs/sft: two adapter checkpoints; the first is the best."""
    adapters = [write_adapter(base.parent / f"step-{k}", base, seed=k) for k in (1, 2)]
    for step, adapter in enumerate(adapters, start=1):

        def write(target: Path, adapter: Path = adapter) -> None:
            shutil.copytree(adapter, target, dirs_exist_ok=True)

        state = {"global_step": step, "best_global_step": 1}
        write_checkpoint(folder / "sft", step, write, state, world=World())
    return folder / "sft"


def test_model_path_errors_name_the_flag(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sft = stage(run, base)
    assert find_checkpoint(base, "--model") == base
    assert find_checkpoint(sft, "--model") == sft / "checkpoint-2"
    assert find_checkpoint(str(sft / "checkpoint-1"), "--model") == sft / "checkpoint-1"
    (run / "config.json").write_text('{"load_best_model_at_end": true}')
    assert find_checkpoint(sft, "--model") == sft / "checkpoint-1"
    shutil.copytree(base, sft / "merged")
    assert find_checkpoint(sft, "--model") == sft / "merged"
    assert find_checkpoint(sft, "--merge", adapter=True) == sft / "checkpoint-1"
    (sft / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"")
    (run / "config.json").write_text(
        json.dumps({"stages": "sft", "beta": 0.1})
    )  # config of the run
    errors = {
        run: f"--sft_checkpoint {run} is the folder of a run: name {sft}",
        tmp_path / "none": f"--sft_checkpoint {tmp_path / 'none'}: no such model folder",
        sft / "checkpoint-1": r"checkpoint-1 is damaged \(adapter_model.safetensors has changed",
        tmp_path: f"--sft_checkpoint {tmp_path}: it has no config.json or adapter_config.json",
    }
    for path, message in errors.items():
        with pytest.raises(UsageError, match=message):
            find_checkpoint(path, "--sft_checkpoint")


@pytest.mark.parametrize(("best", "newest", "result"), [(False, 2, 2), (True, 2, 1), (True, 1, 1)])
def test_checkpoints_are_hashed_once_and_by_rank_0(
    best: bool,
    newest: int,
    result: int,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sft, rows = stage(tmp_path / "run", base), tmp_path / "rows.jsonl"
    (sft / "base").symlink_to(base)  # the adapters name ../base
    if newest == 1:
        shutil.rmtree(sft / "checkpoint-2")
    expected = sorted({f"checkpoint-{newest}", f"checkpoint-{result}"})
    rows.write_text('{"prompt": "Q", "chosen": "a", "rejected": "b"}\n')
    hashed: list[str] = []

    def count(path: Path) -> str | None:
        hashed.append(path.name)
        return find_damage(path)

    for module in ("training.checkpoint", "run.find_checkpoint"):
        monkeypatch.setattr(f"cpo_fast.{module}.find_damage", count)
    given = ["--dataset", str(rows), "--stages", "cpo", "--output_dir"]
    flags = ["--load_best_model_at_end", str(best).lower()]
    run = RunContext(parse_arguments([*given, str(tmp_path / "run"), *flags]))
    assert {find_sft_result(run).name for _ in range(3)} == {f"checkpoint-{result}"}
    assert sorted(hashed) == expected
    hashed.clear()
    args = parse_arguments([*given, str(tmp_path / "out"), "--sft_checkpoint", str(sft)])
    start = prepare_run(args, World())[0].checkpoint.path
    assert sorted(hashed) == expected
    hashed.clear()
    results = [str(sft / f"checkpoint-{result}")]  # of rank 0; the later ones are None

    class Rank1(World):
        def gather(self, value: Any) -> list[Any]:
            return [{"result": results.pop() if results else None}, value]

    assert prepare_run(args, Rank1(rank=1, size=2))[0].checkpoint.path == start
    assert not hashed


def test_commands_accept_stage_folders_and_report_moved_bases(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = stage(tmp_path, base)
    for checkpoint in sft.iterdir():  # as written by training: an absolute path
        file = checkpoint / "adapter_config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
        file.write_text(json.dumps(config))
        (checkpoint / "manifest.json").unlink()
        from cpo_fast.training.checkpoint import _seal

        _seal(checkpoint, {"best_global_step": None})
    out = tmp_path / "out"
    want = logits(load_model(sft / "checkpoint-2"))

    def loaded(flags: list[str]) -> Any:
        args = evaluate_arguments(flags)
        return open_model(resolve_model(args))[2]

    evaluate = ["--model", str(sft), "--dataset", "d", "--output_dir", str(out)]
    torch.testing.assert_close(logits(loaded(evaluate)), want)
    moved = base.rename(tmp_path / "elsewhere")
    message = f"is not there: {base}. Move it back"
    with pytest.raises(UsageError, match=message):
        loaded(evaluate)
    merge = ["--merge", str(sft), "--output_dir", str(out)]
    assert export(merge) == 2 and message in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Q", "chosen": "a", "rejected": "b"}\n')
    flags = ["--dataset", str(rows), "--output_dir", str(tmp_path / "run"), "--stages", "cpo"]
    assert main([*flags, "--sft_checkpoint", str(sft)]) == 2
    assert message in capsys.readouterr().err
    tuned = loaded([*evaluate, "--base_model", str(moved)])
    torch.testing.assert_close(logits(tuned), want)
    assert export([*merge, "--base_model", str(moved)]) == 0
    torch.testing.assert_close(logits(load_model(out)), want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_cpo_trains_on_top_of_an_adapter_with_its_output_layer(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    rows = [
        {"id": f"r{i}", "prompt": f"Is case {i} normal?", "chosen": f"The heart is enlarged {i}.",
         "rejected": f"No pneumothorax {i}."}
        for i in range(6)
    ]  # fmt: skip
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "dataset": data, "output_dir": out, "stages": "cpo,evaluate", "sft_checkpoint": adapter,
        "lora_target_modules": "q_proj,lm_head", "max_steps": 2, "eval_fraction": 0.34,
        "learning_rate": 0.01, "per_device_train_batch_size": 2, "dataloader_num_workers": 0,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    assert main([word for name, value in flags.items() for word in (f"--{name}", str(value))]) == 0
    logged = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    tuned: Any = load_model(out / "cpo" / "checkpoint-2")
    assert tuned.base_model.model.lm_head.lora_B["default"].weight.abs().max() > 1e-4
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned), logits(load_model(adapter)), rtol=0, atol=1e-5)
