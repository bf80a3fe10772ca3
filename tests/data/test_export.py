"""Exports: each format is read back unchanged, or refused with a reason."""

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
from tests.data.samples import SECRET, dicom, image_bytes, write_mimic

KINDS = {"jsonl": "preferences", "ccf": "ccf", "trl": "trl", "swift": "ms-swift"}
IMAGE = {"type": "image"}


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


def there_and_back(
    folder: Path, form: str, *given: Preference
) -> tuple[list[Preference], Exported]:
    path = folder / f"rows.{form}.json"
    done = export(Given(given), path, form)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    source = open_preferences(str(path))
    found = list(source)
    assert (source.rejected, source.kind) == ([], KINDS[form])
    return found, done


def alike(one: Preference) -> Preference:
    """Without fields of the jsonl format only (id, weight), and with texts as lists of parts."""
    prompt = tuple(
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m["content"], str) and not one.plain
        else m
        for m in one.prompt
    )
    return replace(one, id="", weight=1.0, prompt=prompt, patients=())


@pytest.fixture
def pictured(tmp_path: Path) -> Preference:
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


def talk(root: Path) -> Preference:
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look"}, IMAGE, IMAGE]},
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    )
    images = (ImageRef("a.png", str(root)), ImageRef("b.png", str(root), image_bytes()))
    return Preference("t", turns, "x\n", ("y", " z"), images)


@pytest.mark.parametrize("form", FORMATS)
def test_thinking_preferences_come_back(tmp_path: Path, form: str, pictured: Preference) -> None:
    other = replace(pictured, chosen=pictured.chosen.replace("x", "z"))
    found, done = there_and_back(tmp_path, form, pictured, other)
    assert alike(found[0]) == alike(pictured)
    assert found[0].patients == pictured.patients
    assert (len(found), done.records, done.rejected) == (2, 2, {})
    if form == "jsonl":
        assert found[0] == pictured
    if form == "ccf":
        assert found[0].id == pictured.id


@pytest.mark.parametrize("form", ["jsonl", "trl", "swift"])
def test_conversations_come_back(tmp_path: Path, form: str) -> None:
    one = talk(tmp_path)
    ((found,), _) = there_and_back(tmp_path, form, one)
    assert alike(found) == alike(one)


@pytest.mark.parametrize("form", ["jsonl", "trl"])
def test_plain_text_comes_back(tmp_path: Path, form: str) -> None:
    prompt = ({"role": "user", "content": "The heart is"},)
    one = Preference("p", prompt, " large.", (" small.", " clear."), plain=True)
    ((found,), _) = there_and_back(tmp_path, form, one)
    assert alike(found) == alike(one)
    with pytest.raises(DataError, match="plain-text: 1"):
        export(Given([one]), tmp_path / "x", "swift")


@pytest.mark.parametrize("form", ["jsonl", "swift"])
def test_answers_with_images_or_a_prompt_of_their_own_come_back(tmp_path: Path, form: str) -> None:
    image, other = ImageRef("a.png", str(tmp_path)), ImageRef("b.png", str(tmp_path))
    seen = Preference("p", question(1), "x", ("x",), (image,), ((other,),), "perception")
    ((found,), _) = there_and_back(tmp_path, form, seen)
    assert alike(found) == alike(seen)
    told = replace(
        seen, rejected=("y",), rejected_images=(), source="thinking",
        rejected_prompts=(question(1, "What else?"),),
    )  # fmt: skip
    ((found,), _) = there_and_back(tmp_path, form, told)
    assert alike(found) == alike(told)
    for one, reason in ((seen, "rejected-images"), (told, "prompts-differ")):
        with pytest.raises(DataError, match=f"{reason}: 1"):
            export(Given([one]), tmp_path / "x", "trl")


def test_what_a_format_cannot_hold_is_counted(tmp_path: Path, pictured: Preference) -> None:
    tagged = replace(pictured, prompt=question(1, "What does <image> show?"))
    unthought = replace(pictured, chosen=SECRET)
    elsewhere = replace(pictured, images=(ImageRef("a.png", ""),))
    for form, bad, reason in (
        ("swift", tagged, "image-tag-in-text"),
        ("ccf", unthought, "not-a-thought"),
        ("ccf", elsewhere, "not-mimic"),
        ("ccf", replace(pictured, images=pictured.images * 2), "several-images"),
    ):
        done = export(Given([bad, pictured]), tmp_path / "x", form)
        assert (done.records, done.rejected) == (1, {reason: 1})


@pytest.mark.parametrize("form", ["jsonl", "trl"])
def test_answers_of_several_messages_come_back(tmp_path: Path, form: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "ratio"}]}
    turns = (call, {"role": "tool", "content": "0.6"}, {"role": "assistant", "content": "Large."})
    template = {"tools": [{"name": "ratio"}], "mood": "calm"}
    one = replace(talk(tmp_path), chosen=turns, rejected=("y", (call,)), template=template)
    ((found,), _) = there_and_back(tmp_path, form, one)
    assert alike(found) == alike(one)
    for bad, reason in ((one, "tools"), (replace(one, template={}), "several-turns")):
        with pytest.raises(DataError, match=f"{reason}: 1"):
            export(Given([bad]), tmp_path / "x", "swift")


def test_answers_alone_are_not_compared() -> None:
    prompts = ({"role": "user", "content": "Why?"},)
    own = Preference("a", prompts, "x", ("y",), rejected_prompts=(prompts,))
    texts = split_preferences([own, replace(own, rejected=(), rejected_prompts=())], 0.0, 1)
    assert texts.cpo["train"] == [own]
    assert [(one.rejected, one.rejected_prompts) for one in texts.sft["train"]] == [((), ())] * 2


def test_studies_become_rows_of_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
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


def test_image_paths_are_spoken_of_where_there_are_some(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for name, more in (("text", {}), ("seen", {"images": ["x.png"]})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({**row, **more}) + "\n")
        flags = ["--dataset", str(path), "--format", "jsonl", "--output", str(tmp_path / name)]
        assert main(["export", *flags]) == 0
        said = "image paths are relative" in capsys.readouterr().out
        assert said == (name == "seen")


def test_what_cannot_be_written(tmp_path: Path, pictured: Preference) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        export(Given([pictured]), tmp_path / "no/such/folder", "jsonl")
    before = tmp_path / "rows"
    before.write_text("kept")
    with pytest.raises(DataError, match="not-a-thought"):
        export(Given([replace(pictured, chosen="x")]), before, "ccf")
    assert before.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
