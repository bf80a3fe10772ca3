"""Every exported format is read back unchanged or refused with a reason."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.data import open_preferences, open_studies
from cpo_fast.data.__main__ import main
from cpo_fast.data.export import FORMATS, Exported, export
from cpo_fast.data.labels import question, thought
from cpo_fast.data.source import Source
from cpo_fast.errors import DataError
from cpo_fast.run.corpus import split_preferences
from cpo_fast.types import ImageRef, Preference
from tests.data.preference_samples import IMAGE, normalise
from tests.data.samples import SECRET, dicom, image_bytes, write_mimic

KINDS = {"jsonl": "preferences", "ccf": "ccf", "trl": "trl", "swift": "ms-swift"}


class Given(Source[Preference]):
    """A source of given preferences."""

    noun = "preference"

    def __init__(self, given: Iterable[Preference]) -> None:
        super().__init__("given", "given")
        self.given = list(given)

    def _records(self) -> Any:
        for one in self.given:
            self.read += 1
            yield one


def export_and_read(
    folder: Path, form: str, *given: Preference
) -> tuple[list[Preference], Exported]:
    path = folder / f"rows.{form}.json"
    done = export(Given(given), path, form)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    source = open_preferences(str(path))
    found = list(source)
    assert (source.rejected, source.kind) == ([], KINDS[form])
    return found, done


@pytest.fixture
def radiograph(tmp_path: Path) -> Preference:
    path = f"files/p10/p10000032/s50414267/{dicom(3)}.jpg"
    return Preference(
        id="s50414267",
        prompt=question(1),
        chosen=thought("FINDINGS: x\n\nIMPRESSION: y, \u00e9", ["Edema"]),
        rejected=tuple(thought(f"FINDINGS: {n}", [n]) for n in ("Fracture", "Pneumonia")),
        images=(ImageRef(path, str(tmp_path)),),
        weight=2.0,
        patients=("10000032",),
    )


def build_turns(root: Path) -> Preference:
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look"}, IMAGE, IMAGE]},
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    )
    images = (ImageRef("a.png", str(root)), ImageRef("b.png", str(root), image_bytes()))
    return Preference("t", turns, "x\n", ("y", " z"), images)


@pytest.mark.parametrize("form", FORMATS)
def test_thinking_preferences_round_trip(tmp_path: Path, form: str, radiograph: Preference) -> None:
    other = replace(radiograph, chosen=radiograph.chosen.replace("x", "z"))
    found, done = export_and_read(tmp_path, form, radiograph, other)
    assert normalise(found[0]) == normalise(radiograph)
    assert found[0].patients == radiograph.patients
    assert (len(found), done.records, done.rejected) == (2, 2, {})
    if form == "jsonl":
        assert found[0] == radiograph
    if form == "ccf":
        assert found[0].id == radiograph.id


@pytest.mark.parametrize("form", ["jsonl", "trl", "swift"])
def test_conversations_round_trip(tmp_path: Path, form: str) -> None:
    one = build_turns(tmp_path)
    ((found,), _) = export_and_read(tmp_path, form, one)
    assert normalise(found) == normalise(one)


@pytest.mark.parametrize("form", ["jsonl", "trl"])
def test_plain_text_round_trips(tmp_path: Path, form: str) -> None:
    prompt = ({"role": "user", "content": "The heart is"},)
    one = Preference("p", prompt, " large.", (" small.", " clear."), plain=True)
    ((found,), _) = export_and_read(tmp_path, form, one)
    assert normalise(found) == normalise(one)
    with pytest.raises(DataError, match="plain-text: 1"):
        export(Given([one]), tmp_path / "x", "swift")


@pytest.mark.parametrize("form", ["jsonl", "swift"])
def test_rejected_images_and_prompts_round_trip(tmp_path: Path, form: str) -> None:
    image, other = ImageRef("a.png", str(tmp_path)), ImageRef("b.png", str(tmp_path))
    seen = Preference("p", question(1), "x", ("x",), (image,), ((other,),), "perception")
    ((found,), _) = export_and_read(tmp_path, form, seen)
    assert normalise(found) == normalise(seen)
    own_prompt = replace(
        seen, rejected=("y",), rejected_images=(), source="thinking",
        rejected_prompts=(question(1, "What else?"),),
    )  # fmt: skip
    ((found,), _) = export_and_read(tmp_path, form, own_prompt)
    assert normalise(found) == normalise(own_prompt)
    for one, reason in ((seen, "rejected-images"), (own_prompt, "prompts-differ")):
        with pytest.raises(DataError, match=f"{reason}: 1"):
            export(Given([one]), tmp_path / "x", "trl")


def test_unsupported_records_are_counted(tmp_path: Path, radiograph: Preference) -> None:
    tagged = replace(radiograph, prompt=question(1, "What does <image> show?"))
    without_thought = replace(radiograph, chosen=SECRET)
    elsewhere = replace(radiograph, images=(ImageRef("a.png", ""),))
    for form, bad, reason in (
        ("swift", tagged, "image-tag-in-text"),
        ("ccf", without_thought, "not-a-thought"),
        ("ccf", elsewhere, "not-mimic"),
        ("ccf", replace(radiograph, images=radiograph.images * 2), "several-images"),
    ):
        done = export(Given([bad, radiograph]), tmp_path / "x", form)
        assert (done.records, done.rejected) == (1, {reason: 1})


@pytest.mark.parametrize("form", ["jsonl", "trl"])
def test_answers_of_several_messages_round_trip(tmp_path: Path, form: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "ratio"}]}
    turns = (call, {"role": "tool", "content": "0.6"}, {"role": "assistant", "content": "Large."})
    template = {"tools": [{"name": "ratio"}], "mood": "calm"}
    one = replace(build_turns(tmp_path), chosen=turns, rejected=("y", (call,)), template=template)
    ((found,), _) = export_and_read(tmp_path, form, one)
    assert normalise(found) == normalise(one)
    for bad, reason in ((one, "tools"), (replace(one, template={}), "several-turns")):
        with pytest.raises(DataError, match=f"{reason}: 1"):
            export(Given([bad]), tmp_path / "x", "swift")


def test_answers_without_a_pair_are_for_sft_only() -> None:
    prompts = ({"role": "user", "content": "Why?"},)
    own = Preference("a", prompts, "x", ("y",), rejected_prompts=(prompts,))
    texts = split_preferences([own, replace(own, rejected=(), rejected_prompts=())], 0.0, 1)
    assert texts.cpo["train"] == [own]
    assert [(one.rejected, one.rejected_prompts) for one in texts.sft["train"]] == [((), ())] * 2


def test_studies_are_exported_as_sft_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    studies = [
        {"study": 50000001, "labels": {"Edema": "1.0"}, "report": f" FINDINGS: {SECRET}"},
        {"study": 50000002, "report": None},
    ]
    root = write_mimic(tmp_path / "m", studies)
    rows: dict[str, Any] = {}
    for form in FORMATS:
        path = tmp_path / form
        flags = ["--dataset", str(root), "--output", str(path), "--format", form]
        assert main(["export", *flags]) == 0
        text = path.read_text()
        rows[form] = json.loads(text)
        printed = capsys.readouterr()
        assert "1 row of 1 record" in printed.out and "report-missing" in printed.out
        assert SECRET in text and SECRET not in printed.out + printed.err
    (study,) = open_studies(str(root))
    answer = thought(study.report.text, ["Edema"])
    assert rows["jsonl"]["chosen"] == rows["trl"]["completion"][0]["content"] == answer
    assert rows["jsonl"]["rejected_responses"] == []
    assert rows["swift"]["messages"][-1]["content"] == answer
    assert rows["swift"]["images"] == [study.images[0].path]
    for form in FORMATS:
        source = open_preferences(str(tmp_path / form), image_root=str(root))
        (found,) = source
        assert (source.kind, source.alone, source.rejected) == (KINDS[form], 1, [])
        assert (found.chosen, found.rejected, found.images) == (answer, (), study.images)
    assert rows["ccf"][0]["counterfact"] == {} and rows["ccf"][0]["sid"] == "50000001"


def test_note_on_image_paths_needs_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for name, more in (("text", {}), ("seen", {"images": ["x.png"]})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({**row, **more}) + "\n")
        flags = ["--dataset", str(path), "--format", "jsonl", "--output", str(tmp_path / name)]
        assert main(["export", *flags]) == 0
        noted = "image paths are relative" in capsys.readouterr().out
        assert noted == (name == "seen")


def test_failed_export_keeps_the_old_file(tmp_path: Path, radiograph: Preference) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        export(Given([radiograph]), tmp_path / "no/such/folder", "jsonl")
    before = tmp_path / "rows"
    before.write_text("kept")
    with pytest.raises(DataError, match="not-a-thought"):
        export(Given([replace(radiograph, chosen="x")]), before, "ccf")
    assert before.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
