"""Cached reference log-probs: equal to online ones, keyed, resumable."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpo_fast.errors import UsageError
from cpo_fast.model.build import add_lora
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import collate, encode_all, image_token_id
from cpo_fast.run import reference_cache
from cpo_fast.run.reference_cache import ReferenceCache
from cpo_fast.testing.samples import (
    image,
    images,
    mixed,
    preference,
    tokenizer,
    vision_language_model,
)
from cpo_fast.training.interrupt import Interrupted, StopRequest
from cpo_fast.training.objectives import CPOObjective


def groups():
    """Mixed groups, two of them with the same id."""
    samples = [*mixed(), preference("one", 2, image(80, 80), words=3)]
    return encode_all(samples, tokenizer(), images().grid, max_length=4000).groups


def adapted(scale: float = 0.05) -> Any:
    model = add_lora(vision_language_model(), r=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def cache(folder: Path, model: Any = None, **options: Any) -> ReferenceCache:
    settings: dict[str, Any] = {
        "adapters_off": True,
        "checkpoint": Checkpoint(folder, tokenizer(), images()),
        "device": torch.device("cpu"),
        "stop": StopRequest(),
        "packing_length": 60,
        **options,
    }
    return ReferenceCache(folder, PackedModel(model or adapted()), **settings)


def batch_of(filled):
    pack = tuple((i, tuple(range(len(group.rejected)))) for i, group in enumerate(filled))
    pad = image_token_id(tokenizer())
    return collate(filled, pack, pixels=images().pixels, image_token_id=pad)


def test_cache_equals_the_online_reference(tmp_path: Path) -> None:
    cached = cache(tmp_path)
    filled = cached.fill(groups())
    batch = batch_of(filled)
    assert batch.ref_logps is not None
    objective = CPOObjective(cached.model)
    online = objective.score(replace(batch, ref_logps=None))
    torch.testing.assert_close(batch.ref_logps, online.ref_logps.float(), atol=1e-5, rtol=1e-6)
    out = objective.score(batch)
    assert (out.logps - out.ref_logps).abs().max() > 1e-3  # the adapters have an effect
    torch.testing.assert_close(out.losses, online.losses, atol=1e-6, rtol=0)


def test_the_first_loss_is_log_2_and_the_model_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = cache(tmp_path, adapted(0.0))
    batch = batch_of(cached.fill(groups()))
    monkeypatch.setattr(PackedModel, "_forward", count := Counted(PackedModel._forward))
    out = CPOObjective(cached.model).score(batch)
    assert out.losses.detach().numpy() == pytest.approx(math.log(2), abs=1e-6)
    assert count.calls == 1


class Counted:
    def __init__(self, function: Any) -> None:
        self.function = function
        self.calls = 0

    def __get__(self, instance: Any, owner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.function(instance, *args, **kwargs)

        return call


def test_cache_is_read_without_recomputing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = cache(tmp_path).fill(groups())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference_log_probs.safetensors"]
    monkeypatch.setattr(ReferenceCache, "_score", None)
    # The adapters of a resumed run are trained; the reference is unchanged.
    assert cache(tmp_path, adapted(0.3)).fill(groups()) == filled
    file = tmp_path / "reference_log_probs.safetensors"
    with safe_open(file, framework="pt") as found:
        earlier = found.metadata() | {"tokenizer": "0"}  # which earlier versions compared
    save_file(load_file(file), file, metadata=earlier)
    assert cache(tmp_path).fill(groups()) == filled


def test_frozen_copy_gives_the_same_reference(tmp_path: Path) -> None:
    filled = cache(tmp_path, vision_language_model(), adapters_off=False).fill(groups())
    assert cache(tmp_path).fill(groups()) == filled


@pytest.mark.parametrize("part", ["data", "model", "settings"])
def test_cache_with_another_key_is_rejected(tmp_path: Path, part: str) -> None:
    cache(tmp_path).fill(groups())
    other, data = cache(tmp_path), groups()
    if part == "data":
        data[0] = replace(data[0], chosen=data[0].chosen[:-1])
    elif part == "model":
        weight = other.model.model.get_input_embeddings().weight
        weight.data[5, 7] += 1e-3
    else:
        other.model.attention = "sdpa"
    with pytest.raises(UsageError, match=f"other {part} than"):
        other.fill(data)
    other.overwrite = True
    other.fill(data)
    assert other.fill(data)


def test_changed_image_changes_the_cache_key(tmp_path: Path) -> None:
    file = tmp_path / "a.png"

    def read(seed: int):
        file.write_bytes(image(80, 80, seed).data)
        ref = replace(image(80, 80), path="a.png", root=str(tmp_path), data=None)
        return encode_all(
            [preference("a", 1, ref)], tokenizer(), images().grid, max_length=999
        ).groups

    cache(tmp_path).fill(read(0))
    with pytest.raises(UsageError, match="other data"):
        cache(tmp_path).fill(read(1))


def test_stopped_computation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "PART", 2)
    (tmp_path / "whole").mkdir()
    want = cache(tmp_path / "whole").fill(groups())

    stop = StopRequest()
    score = ReferenceCache._score
    scored: list[int] = []

    def score_then_stop(self: ReferenceCache, batch: Any) -> torch.Tensor:
        scored.append(batch.num_segments)
        if (self.folder / "reference_log_probs.parts" / "part-000000000.safetensors").exists():
            stop.reason = "SIGTERM"
        return score(self, batch)

    monkeypatch.setattr(ReferenceCache, "_score", score_then_stop)
    with pytest.raises(Interrupted, match="SIGTERM"):
        cache(tmp_path, stop=stop).fill(groups())
    assert not (tmp_path / "reference_log_probs.safetensors").exists()
    before = len(scored)
    damaged = tmp_path / "reference_log_probs.parts" / "part-000000002.partial"
    damaged.write_bytes(b"killed while writing")
    assert cache(tmp_path, stop=StopRequest()).fill(groups()) == want
    segments = sum(1 + len(group.rejected) for group in groups())
    assert sum(scored[:before]) + sum(scored[before:]) == segments  # nothing was computed twice
    assert scored[before:]


def test_damaged_cache_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "reference_log_probs.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UsageError, match="damaged"):
        cache(tmp_path).fill(groups())


def test_group_with_bad_image_gets_no_ref_logps(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(image(80, 80).data)
    ref = replace(image(80, 80), path="a.png", root=str(tmp_path), data=None)
    made = encode_all(
        [preference("a", 1, ref), preference("b", 2)], tokenizer(), images().grid, max_length=999
    ).groups
    file.write_bytes(image(80, 80).data[:300])
    broken, good = cache(tmp_path).fill(made)
    assert broken.ref_logps == () and len(good.ref_logps) == 3
