"""Images that vanish after the check are rejected by name in every stage and counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast import train
from cpo_fast.errors import DataError, RecordError
from cpo_fast.model.build import add_lora, save_model
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import encode_all, image_token_id
from cpo_fast.packing.readable import readable
from cpo_fast.phantom import write_phantom
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.context import RunContext
from cpo_fast.run.evaluation import compare_held_out, evaluate_run
from cpo_fast.run.run_folder import RunFolder
from cpo_fast.run.stages import add_reference_logps
from cpo_fast.testing.runs import parse_arguments
from cpo_fast.testing.samples import image, images, preference, tokenizer, vision_language_model
from cpo_fast.training.distributed import World
from cpo_fast.training.interrupt import StopRequest
from cpo_fast.training.loop import StageData, StageOutput, Trainer
from cpo_fast.training.metrics import MetricsLog
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import ImageRef, Origin, PreferenceGroup

CPU = torch.device("cpu")


def group_list(*sizes: int) -> list[PreferenceGroup]:
    """A pair with an image for each width; row i of pairs.jsonl."""
    samples = [
        replace(preference(str(i), 1, image(size, 60)), origin=Origin("pairs.jsonl", i + 1))
        for i, size in enumerate(sizes)
    ]
    return encode_all(samples, tokenizer(), images().grid, max_length=1000).groups


def gone(*groups: PreferenceGroup) -> Callable[[ImageRef], Any]:
    """Decodes all images except those of these groups."""
    lost = {ref for group in groups for ref in group.prompt.images}

    def pixels(ref: ImageRef) -> Any:
        if ref in lost:
            raise RecordError("image-missing", f"{ref.path} is not there")
        return images().pixels(ref)

    return pixels


def arguments(folder: Path, *flags: str) -> TrainArguments:
    return parse_arguments(["--dataset", "pairs.jsonl", "--output_dir", str(folder),
                            "--dataloader_num_workers", "0", "--max_steps", "4",
                            "--per_device_train_batch_size", "1",
                            "--gradient_accumulation_steps", "1", *flags])  # fmt: skip


def trainer(
    folder: Path,
    groups: list[PreferenceGroup],
    held_out: list[PreferenceGroup],
    pixels: Any,
    *flags: str,
) -> Trainer:
    model = PackedModel(add_lora(vision_language_model(), r=2, alpha=4))
    folder.mkdir(exist_ok=True)

    def save(path: Path, sharded: bool) -> dict[str, str]:
        return {}

    return Trainer(
        arguments(folder, *flags).stage_settings("cpo"),
        model,
        CPOObjective(model),
        StageData(groups, held_out, pixels, image_token_id(tokenizer())),
        StageOutput(folder / "cpo", MetricsLog(folder / "metrics.jsonl"), save),
        device=CPU,
        stop=StopRequest(),
    )


def test_vanished_held_out_image_is_listed_and_counted(tmp_path: Path) -> None:
    groups, held_out = group_list(60, 64, 68, 72), group_list(76, 80, 84)
    result = trainer(tmp_path, groups, held_out, gone(held_out[1])).run()
    assert result.final["eval_left_out"] == 1
    (record,) = result.rejected
    assert (record.file, record.line, record.stage) == ("pairs.jsonl", 2, "cpo")
    assert record.reason == "image-missing" and held_out[1].prompt.images[0].path in record.detail
    whole = trainer(tmp_path / "w", groups, [held_out[0], held_out[2]], gone()).run()
    assert result.final["eval_loss"] == pytest.approx(whole.final["eval_loss"], rel=1e-6)
    assert "eval_left_out" not in whole.final


def test_all_held_out_images_vanished_is_an_error_after_a_checkpoint(tmp_path: Path) -> None:
    groups, held_out = group_list(60, 64, 68, 72), group_list(76, 80)
    with pytest.raises(DataError, match="no held-out sample could be read"):
        trainer(tmp_path, groups, held_out, gone(*held_out)).run()
    assert [path.name for path in (tmp_path / "cpo").iterdir()] == ["checkpoint-4"]


def test_vanished_training_image_is_skipped_and_all_vanished_stop_the_run(tmp_path: Path) -> None:
    groups = group_list(60, 64, 68, 72)
    one = trainer(tmp_path / "one", groups, [], gone(groups[2])).run()
    assert [record.line for record in one.rejected] == [3] and one.steps == 4
    with pytest.raises(DataError, match="no training sample of 3 steps in a row could be read"):
        trainer(tmp_path / "all", groups, [], gone(*groups)).run()


def test_image_with_changed_size_is_rejected() -> None:
    (group,) = group_list(60)

    def other(_: ImageRef) -> Any:
        return images().pixels(image(112, 112))

    pack = ((0, (0,)),)
    found = readable([group], pack, other, image_token_id(tokenizer()))
    assert found.pack == () and found.failed[0][1].reason == "image-changed"
    assert readable([group], pack, images().pixels, image_token_id(tokenizer())).pack == pack


class Losing(Checkpoint):
    """A checkpoint that cannot read some images."""

    lost: Iterable[PreferenceGroup] = ()

    @property
    def pixels(self) -> Any:
        return gone(*self.lost)


def run_without(folder: Path, *lost: PreferenceGroup, flags: Sequence[str] = ()) -> RunContext:
    """A run in which the images of some groups are missing."""
    run = RunContext(arguments(folder, *flags))
    run.checkpoint = Losing(folder, tokenizer(), images())
    object.__setattr__(run.checkpoint, "lost", lost)
    return run


def listed(folder: RunFolder) -> list[dict[str, Any]]:
    text = (folder.path / "rejected_records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_held_out_pairs_are_scored_without_vanished_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = group_list(60, 64, 68)
    model = add_lora(vision_language_model(), r=2, alpha=4)
    run = run_without(tmp_path, groups[1])
    found = compare_held_out(run, model, groups, names=("cpo", "sft"))
    assert (found["cpo"]["pairs"], found["sft"]["pairs"]) == (2, 2)
    assert [(r["line"], r["stage"]) for r in listed(run.folder)] == [(2, "evaluate")]
    assert "rewards: 1 sample left out" in capsys.readouterr().out
    with pytest.raises(DataError, match="no held-out pair of 3 samples could be read"):
        compare_held_out(run_without(tmp_path, *groups), model, groups, names=("cpo", "sft"))


def test_group_rejected_by_the_reference_is_not_trained(tmp_path: Path) -> None:
    packed = PackedModel(add_lora(vision_language_model(), r=2, alpha=4))
    groups = group_list(60, 64, 68, 72)
    splits = {"train": groups[:3], "validate": groups[3:], "test": []}
    flags = ("--precompute_ref_log_probs", "true")
    run = run_without(tmp_path, groups[1], flags=flags)
    filled = add_reference_logps(run, packed, splits)
    assert [group.id for group in filled["train"]] == ["0", "2"]
    assert all(group.ref_logps for group in (*filled["train"], *filled["validate"]))
    (record,) = listed(run.folder)
    assert (record["id"], record["line"], record["reason"]) == ("1", 2, "image-missing")
    again = run_without(tmp_path, groups[1], flags=flags)  # reads the file of the first run run run
    filled = add_reference_logps(again, packed, splits)
    assert [group.id for group in filled["train"]] == ["0", "2"]
    assert [record["reason"] for record in listed(again.folder)] == ["no-reference-logps"]


def test_test_studies_with_vanished_images_are_left_out_for_all_models(tmp_path: Path) -> None:
    data = write_phantom(tmp_path / "data", num_studies=40, image_size=64)
    save_model(vision_language_model(), tmp_path / "m", tokenizer=tokenizer(), images=images())
    args = parse_arguments(["--dataset", str(data), "--output_dir", str(tmp_path / "run"),
                            "--model_name_or_path", str(tmp_path / "m"), "--max_pixels", "3136",
                            "--max_new_tokens", "2", "--dataloader_num_workers", "0",
                            "--stages", "graph,counterfactual,evaluate"])  # fmt: skip
    run, *parts = train.prepare_run(args, World())
    corpus = parts[0]
    tested = corpus.studies["test"]
    (data / tested[0].images[0].path).unlink()
    assert evaluate_run(run, *parts)["studies"] == len(tested) - 1 > 0
    (record,) = (r for r in listed(run.folder) if r.get("stage") == "evaluate")
    assert (record["id"], record["reason"]) == (tested[0].study_id, "image-missing")
    for study in tested[1:]:
        (data / study.images[0].path).unlink()
    with pytest.raises(DataError, match=r"an image fails in each of \d+ studies"):
        evaluate_run(run, *parts)
