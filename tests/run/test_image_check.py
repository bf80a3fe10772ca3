"""Images are decoded before training; failing ones are rejected once for all stages and counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.errors import DataError, RecordError
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.phantom import write_phantom
from cpo_fast.run import image_check
from cpo_fast.run.context import RunContext
from cpo_fast.run.corpus import Corpus, Texts, build_texts, read_corpus
from cpo_fast.run.image_check import ImageCheck, reject_samples, reject_studies
from cpo_fast.run.run_folder import RunFolder
from cpo_fast.run.samples import tokenise
from cpo_fast.testing.runs import parse_arguments
from cpo_fast.testing.samples import images, tokenizer
from cpo_fast.training.distributed import World
from cpo_fast.types import ImageRef
from tests.data.samples import image_bytes, write_mimic
from tests.data.test_openi import citation

TRUNCATED = image_bytes(size=(400, 300))[:900]
NO_DECODER = "No decoder for this transfer syntax (JPEG-LS, 1.2.3): install pylibjpeg"


@dataclass
class Prepared:
    run: RunContext
    corpus: Corpus
    texts: Texts
    check: ImageCheck

    @property
    def folder(self) -> RunFolder:
        return self.run.folder

    @property
    def listed(self) -> list[dict[str, Any]]:
        text = (self.folder.path / "rejected_records.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def summary(self) -> dict[str, Any]:
        self.run.checkpoint = Checkpoint(self.folder.path, tokenizer(), images())
        tokenise(self.run, self.texts)
        self.folder.finish({})
        return json.loads((self.folder.path / "summary.json").read_text(encoding="utf-8"))["data"]

    def ids(self, stage: str, split: str) -> list[str]:
        return [one.id for one in getattr(self.texts, stage)[split]]


def prepared(dataset: Path, folder: Path, *flags: str, world: World | None = None) -> Prepared:
    """The steps of train.prepare_run before the model is opened."""
    args = parse_arguments(["--dataset", str(dataset), "--output_dir", str(folder),
                            "--max_pixels", "12544", "--dataloader_num_workers", "0",
                            *flags])  # fmt: skip
    run = RunContext(args, world or World())
    corpus = read_corpus(run)
    check = ImageCheck(run)
    reject_studies(run, corpus, check)
    texts = build_texts(run, corpus)
    reject_samples(run, corpus, texts, check)
    run.folder.summary["stages"]["images"] = check.summary()
    return Prepared(run, corpus, texts, check)


def write_rows(folder: Path, count: int = 24, bad: Iterable[int] = ()) -> Path:
    """pairs.jsonl with an image for each row; the images of `bad` are truncated."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(TRUNCATED if i in bad else image_bytes(size=(60, 60)))
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        answers = {"chosen": f"The lungs are clear, {i}.", "rejected": "An effusion."}
        rows.append({"prompt": asked, "images": [f"{i}.jpg"], **answers})
    return write_lines(folder / "pairs.jsonl", rows)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the images in the order in which they are decoded."""
    paths: list[str] = []
    load = image_check.load_shades

    def noted(ref: ImageRef) -> Any:
        paths.append(ref.path)
        return load(ref)

    monkeypatch.setattr(image_check, "load_shades", noted)
    return paths


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("data") / "d", num_studies=60, image_size=64)


# --- preference files ----------------------------------------------------------------------------


def test_truncated_image_is_rejected_with_file_line_and_name(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", bad=[7])
    run = prepared(data, tmp_path / "run")
    (record,) = run.listed
    assert record["file"] == str(data) and (record["line"], record["id"]) == (8, "pairs:8")
    assert record["reason"] == "image-unreadable" and record["detail"].startswith("7.jpg: OSError")
    everywhere = [run.ids(stage, split) for stage in ("sft", "cpo") for split in run.texts.sft]
    assert not any("pairs:8" in ids for ids in everywhere)
    assert sum(map(len, run.texts.cpo.values())) == 23


def test_shared_bad_image_is_decoded_once_and_rejects_both_rows(
    tmp_path: Path, decoded: list[str]
) -> None:
    data = write_rows(tmp_path / "data", count=40, bad=[0])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[30]["images"] = ["0.jpg"]
    run = prepared(write_lines(data, rows), tmp_path / "run")
    assert sorted(record["line"] for record in run.listed) == [1, 31]
    assert sorted(decoded) == sorted(f"{i}.jpg" for i in range(40) if i != 30)


def test_bad_image_of_a_rejected_answer_rejects_the_row(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", count=30, bad=[29])
    rows = [json.loads(line) for line in data.read_text().splitlines()][:29]
    same = [{"role": "assistant", "content": "The lungs are clear."}]
    rows[4] = {"messages": [], "images": ["4.jpg"], "rejected_images": ["29.jpg"]}
    rows[4]["messages"] = [{"role": "user", "content": "<image>?"}, *same]
    swift = [rows[4], *({**rows[4], "images": [f"{i}.jpg"], "rejected_images": [f"{i + 1}.jpg"]}
                        for i in range(25))]  # fmt: skip
    run = prepared(write_lines(data, swift), tmp_path / "run")
    assert [(record["line"], record["reason"]) for record in run.listed] == [
        (1, "image-unreadable")
    ]
    assert not any("pairs:1" in run.ids(stage, "train") for stage in ("sft", "cpo"))


def test_parquet_rows_are_named_by_number(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    asked = [{"role": "user", "content": "<image>?"}]
    pictures = [TRUNCATED if i == 3 else image_bytes(size=(60 + i, 60)) for i in range(24)]
    rows = [{"prompt": asked, "chosen": [{"role": "assistant", "content": f"Clear, {i}."}],
             "rejected": [{"role": "assistant", "content": "An effusion."}],
             "images": [{"bytes": picture, "path": None}]}
            for i, picture in enumerate(pictures)]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    run = prepared(tmp_path / "pairs.parquet", tmp_path / "run", "--eval_fraction", "0")
    assert [(record["line"], record["reason"]) for record in run.listed] == [
        (4, "image-unreadable")
    ]


def test_images_beyond_max_eval_samples_are_not_decoded(tmp_path: Path, decoded: list[str]) -> None:
    data = write_rows(tmp_path / "data", count=40)
    run = prepared(data, tmp_path / "run", "--eval_fraction", "0.5", "--max_eval_samples", "2")
    assert len(run.texts.cpo["validate"]) == 2
    assert len(decoded) == 2 + len(run.texts.cpo["train"]) < 40
    assert run.folder.left_out == 40 - len(decoded)


def test_too_many_bad_images_stop_the_run_before_training(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", bad=range(3))
    with pytest.raises(DataError, match="an image cannot be read in 3 of 24 records: more"):
        prepared(data, tmp_path / "run")
    assert len((tmp_path / "run" / "rejected_records.jsonl").read_text().splitlines()) == 3


def test_reader_rejections_count_in_max_bad_fraction(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", count=40, bad=[0])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    prepared(write_lines(data, rows), tmp_path / "one")  # 1 bad record of 40 is allowed
    rows[1:3] = ["{", "{"]  # and 2 of 40
    with pytest.raises(DataError, match="in 1 of 38 records and 2 of 40 were set"):
        prepared(write_lines(data, rows), tmp_path / "two")


def test_missing_decoder_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(ref: ImageRef) -> Any:
        raise RecordError("no-decoder", NO_DECODER)

    data = write_rows(tmp_path / "data")
    monkeypatch.setattr(image_check, "load_shades", none)
    with pytest.raises(DataError) as caught:
        prepared(data, tmp_path / "run")
    assert str(caught.value) == f"{NO_DECODER} (24 images)"
    assert (tmp_path / "run" / "rejected_records.jsonl").read_text() == ""


def test_missing_decoder_for_few_images_warns_and_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = image_check.load_shades

    def few(ref: ImageRef) -> Any:
        if ref.path == "8.jpg":
            raise RecordError("no-decoder", NO_DECODER)
        return load(ref)

    data = write_rows(tmp_path / "data")
    monkeypatch.setattr(image_check, "load_shades", few)
    run = prepared(data, tmp_path / "run")
    assert capsys.readouterr().err.count(f"warning: {NO_DECODER} (1 image)") == 1
    assert [(r["line"], r["detail"]) for r in run.listed] == [(9, f"8.jpg: {NO_DECODER}")]


def test_unreadable_held_out_split_is_an_error(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", count=40)
    flags = ["--eval_fraction", "0.05", "--max_bad_fraction", "0.5"]
    held_out = prepared(data, tmp_path / "whole", *flags).ids("cpo", "validate")
    assert held_out
    for name in held_out:
        (tmp_path / "data" / f"{int(name.split(':')[1]) - 1}.jpg").write_bytes(TRUNCATED)
    with pytest.raises(DataError, match="no held-out sample could be read: an image fails in each"):
        prepared(data, tmp_path / "run", *flags)


def test_workers_find_the_same_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_check, "PER_PROCESS", 4)
    data = write_rows(tmp_path / "data", bad=[7])
    run = prepared(data, tmp_path / "run", "--dataloader_num_workers", "2")
    assert [record["line"] for record in run.listed] == [8]


def test_dry_run_decodes_few_images(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_check, "FEW", 5)
    data = write_rows(tmp_path / "data", count=40)
    run = prepared(data, tmp_path / "run", "--dry_run", "true")
    assert 0 < len(decoded) <= 5 and sum(map(len, run.texts.sft.values())) == 40
    assert not (tmp_path / "run").exists()


def test_dry_run_decodes_few_study_images(
    phantom: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_check, "FEW", 5)
    prepared(phantom, tmp_path / "run", "--dry_run", "true")
    assert 0 < len(decoded) <= 5


def test_resumed_run_decodes_only_new_images(tmp_path: Path, decoded: list[str]) -> None:
    data = write_rows(tmp_path / "data", bad=[7])
    first = prepared(data, tmp_path / "run")
    decoded.clear()
    again = prepared(data, tmp_path / "run", "--resume_from_checkpoint", "auto")
    assert decoded == ["7.jpg"]  # failed images are decoded again
    assert again.listed == first.listed and again.texts.sft == first.texts.sft
    decoded.clear()
    (tmp_path / "data" / "7.jpg").write_bytes(image_bytes(size=(64, 60)))
    (tmp_path / "data" / "9.jpg").write_bytes(image_bytes(size=(90, 60)))
    repaired = prepared(data, tmp_path / "run", "--resume_from_checkpoint", "auto")
    assert sorted(decoded) == ["7.jpg", "9.jpg"] and repaired.listed == []


def test_all_ranks_use_the_result_of_rank_0(tmp_path: Path, decoded: list[str]) -> None:
    class Second(World):
        def on_main(self, work: Any) -> Any:
            work  # noqa: B018 (rank 0 does it)
            found = [[f"{tmp_path / 'data'}\0" + "3.jpg", "image-unreadable", "cut short"]]
            return found if work.__qualname__.startswith("ImageCheck.decode") else None

    data = write_rows(tmp_path / "data")
    run = prepared(data, tmp_path / "run", world=Second(rank=1, size=2))
    assert decoded == [] and sum(map(len, run.texts.sft.values())) == 23
    assert "pairs:4" not in run.ids("sft", "train") + run.ids("sft", "validate")


# --- studies -------------------------------------------------------------------------------------


def test_one_bad_image_per_split_is_left_out_of_all_stages(phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom, tmp_path / "data")
    whole = prepared(tmp_path / "data", tmp_path / "whole")
    bad = {split: whole.corpus.studies[split][1] for split in whole.corpus.studies}
    for study in bad.values():
        (tmp_path / "data" / study.images[0].path).write_bytes(TRUNCATED)
    flags = ["--counterfactual_sources", "thinking,perception", "--max_bad_fraction", "0.1"]
    run = prepared(tmp_path / "data", tmp_path / "run", *flags)
    listed = {record["id"]: record for record in run.listed if "stage" not in record}
    assert listed.keys() == {study.study_id for study in bad.values()}
    for study in bad.values():
        record = listed[study.study_id]
        assert record["file"].endswith(f"{study.study_id}.txt")
        assert study.images[0].path in record["detail"]
    pairs = [one for split in run.texts.cpo.values() for one in split]
    shown = {image for one in pairs for image in one.all_images}
    assert shown and not shown & {study.images[0] for study in bad.values()}
    for split, study in bad.items():
        assert study.study_id not in run.ids("sft", split) + run.ids("cpo", split)
        assert study.study_id not in {one.study_id for one in run.corpus.studies[split]}
    assert not {c.study_id for c in run.texts.counterfactuals} & listed.keys()


def test_bad_perception_image_drops_the_pair_and_keeps_the_study(
    phantom: Path, tmp_path: Path
) -> None:
    shutil.copytree(phantom, tmp_path / "data")
    flags = ["--counterfactual_sources", "thinking,perception"]
    made = prepared(tmp_path / "data", tmp_path / "made", *flags)
    study = made.corpus.studies["validate"][0]
    (shown,) = {c.rejected_images for c in made.texts.counterfactuals
                if c.id == f"{study.study_id}/perception"}  # fmt: skip
    # Only the first held-out study is used; the swapped image is of another study.
    (tmp_path / "made" / shown[0]).resolve().write_bytes(TRUNCATED)
    given = str(tmp_path / "made" / "counterfactuals.jsonl")
    flags += ["--max_eval_samples", "1", "--counterfactuals", given]
    run = prepared(tmp_path / "data", tmp_path / "run", *flags)
    assert [(record["id"], record["stage"]) for record in run.listed] == [
        (f"{study.study_id}/perception", "counterfactual")
    ]
    (kept,) = run.texts.cpo["validate"]
    assert set(kept.sources) == {"thinking"} and run.ids("sft", "validate") == [study.study_id]
    assert run.folder.summary["data"]["counterfactuals"]["unreadable"] == 1


def test_test_images_are_not_decoded_without_evaluation(
    phantom: Path, tmp_path: Path, decoded: list[str]
) -> None:
    run = prepared(phantom, tmp_path / "run", "--stages", "graph,counterfactual,sft")
    used = [*run.corpus.studies["train"], *run.corpus.studies["validate"]]
    assert sorted(decoded) == sorted(study.images[0].path for study in used)


# --- read = used + rejected + left out -----------------------------------------------------------


def adds_up(data: dict[str, Any]) -> bool:
    return data["read"] == data["used"] + sum(data["rejected"].values()) + data["left_out"]


def test_mimic_record_counts_add_up_without_counterfactuals(tmp_path: Path) -> None:
    report = "FINDINGS: The lungs are clear.\n\nIMPRESSION: No acute process.\n"
    ids = [str(50000000 + i) for i in range(30)]
    studies = [{"study": id, "report": report, "patient": str(10000000 + i % 7),
                "split": "test" if i > 24 else "validate" if i > 20 else "train"}
               for i, id in enumerate(ids)]  # fmt: skip
    studies[3]["report"] = " FINDINGS:\n"
    for ill in studies[4:8]:
        ill["report"] = "FINDINGS: Small left pleural effusion.\n\nIMPRESSION: Effusion.\n"
        ill["labels"] = {"Pleural Effusion": "1.0"}
    data = write_mimic(tmp_path / "data", studies)
    sorted(data.rglob("*.jpg"))[0].write_bytes(TRUNCATED)
    flags = ["--max_bad_fraction", "0.2", "--max_train_samples", "12", "--max_eval_samples", "2",
             "--counterfactual_sources", "thinking,perception"]  # fmt: skip
    run = prepared(data, tmp_path / "run", *flags)
    found = run.summary()
    assert found["read"] == 30 and adds_up(found)
    assert found["rejected"] == {"no-findings-or-impression": 1, "image-unreadable": 1}
    assert found["left_out"] > 0
    made = found["counterfactuals"]
    listed = [record for record in run.listed if record.get("stage") == "counterfactual"]
    assert made["failed"] == {"neighbour": len(listed)} and listed  # held-out are healthy
    assert made["made"] == made["passed"] + len(listed)


def test_open_i_record_counts_add_up(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(30):
        text = citation(f"CXR{i}", f"The lungs are clear, {i}.", "Small effusion.", ("normal",))
        (tmp_path / "data" / f"{i}.xml").write_text("<other/>" if i == 4 else text)
    run = prepared(tmp_path / "data", tmp_path / "run", "--max_train_samples", "9")
    found = run.summary()
    assert found["read"] == 30 and adds_up(found)
    assert found["rejected"] == {"not-open-i": 1} and found["used"] < 29
    assert run.corpus.studies["train"][0].origin.file.endswith(".xml")


def test_preference_file_record_counts_add_up(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", count=40, bad=[7])
    rows: list[Any] = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3] = "{"
    rows[9]["chosen"] = "The lungs are clear. " * 500  # over-long in both stages
    rows[11]["rejected"] = "An effusion. " * 500  # in CPO only
    flags = ["--max_length", "600", "--max_bad_fraction", "0.2"]
    run = prepared(write_lines(data, rows), tmp_path / "run", *flags)
    found = run.summary()
    assert found["read"] == 40 and found["used"] == 37 and adds_up(found)
    assert found["rejected"] == {"json-invalid": 1, "image-unreadable": 1, "over-long": 1}
    assert found["samples_set_aside"] == {"cpo": {"over-long": 1}}
    where = {(r["line"], r["reason"], r.get("stage")) for r in run.listed}
    assert where == {(4, "json-invalid", None), (8, "image-unreadable", None),
                     (10, "over-long", None), (12, "over-long", "cpo")}  # fmt: skip


def test_data_check_names_the_same_record(tmp_path: Path) -> None:
    from cpo_fast.data import open_preferences
    from cpo_fast.data.check import check

    data = write_rows(tmp_path / "data", bad=[7])
    found = check(open_preferences(str(data)))
    assert [one.to_json() for one in found.rejected] == prepared(data, tmp_path / "run").listed


def test_data_check_decodes_the_images_of_a_run(tmp_path: Path) -> None:
    from cpo_fast.data import open_studies
    from cpo_fast.data.check import check

    data = write_mimic(tmp_path / "data", [{"study": "50000001", "views": ("PA", "AP")}])
    second = sorted(data.rglob("*.jpg"))[1]
    second.write_bytes(TRUNCATED)
    assert check(open_studies(str(data))).facts["used"] == 1
    assert check(open_studies(str(data)), max_images=2).facts["used"] == 0


def test_origin_is_ignored_when_comparing_records(tmp_path: Path) -> None:
    run = prepared(write_rows(tmp_path / "data"), tmp_path / "run")
    one = run.texts.cpo["train"][0]
    assert one.origin is not None and replace(one, origin=None) == one
