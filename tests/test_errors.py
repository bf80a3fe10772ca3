"""Exit status of every error class; messages name fault, place and remedy."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

import cpo_fast
from cpo_fast import train
from cpo_fast.cli import main
from cpo_fast.concepts import load_graph
from cpo_fast.counterfactual.generate import counterfactuals
from cpo_fast.counterfactual.graph.rewrite import rewrite
from cpo_fast.counterfactual.graph.scope import AMBIGUOUS, AmbiguousError
from cpo_fast.counterfactual.prompt import Task
from cpo_fast.counterfactual.writers import Draft, GaveUpError, GraphWriter
from cpo_fast.data.images import load_image
from cpo_fast.errors import CpoFastError, RecordError, UsageError
from cpo_fast.training.interrupt import EXIT_STATUS, Interrupted
from cpo_fast.types import ConceptGraph, ImageRef, Report
from tests.counterfactual.samples import OPACITY, study


def find_error_classes() -> set[type[CpoFastError]]:
    """CpoFastError and all its subclasses, after every module is imported."""
    for module in pkgutil.walk_packages(cpo_fast.__path__, "cpo_fast."):
        if not re.search(r"\.(kernels|integrations|_cpu|_cuda|__main__)\b", module.name):
            importlib.import_module(module.name)
    found = {CpoFastError}
    while more := {s for c in found for s in c.__subclasses__()} - found:
        found |= more
    return found


def read_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Stderr: one message, no traceback."""
    error = capsys.readouterr().err.strip()
    assert error.startswith("cpo-fast train: error: ") and "Traceback" not in error, error
    return error


def test_error_classes_print_one_line_and_set_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in find_error_classes():
        raised = kind() if kind is AmbiguousError else kind("what, where, remedy")

        def failed(args: object, raised: CpoFastError = raised) -> None:
            raise raised

        monkeypatch.setattr(train, "run", failed)
        status = {UsageError: 2, Interrupted: EXIT_STATUS}.get(kind, 1)
        assert main(["train"]) == status, kind
        error = capsys.readouterr().err.strip()
        prefix = "" if kind is Interrupted else "cpo-fast train: error: "
        assert error == f"{prefix}{raised}"


def test_usage_errors_name_flag_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--stages", "sft,cop"]) == 2
    error = read_error(capsys)
    assert "--stages sft,cop" in error and "graph,counterfactual,sft,cpo,evaluate" in error


def test_data_errors_name_place_and_expectation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", str(tmp_path / "nothing"), "--output_dir", str(tmp_path / "out")]
    assert main(["data", "check", *flags]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert main(["train", *flags, "--model_name_or_path", "tiny"]) == 2
    assert str(tmp_path / "nothing") in read_error(capsys)


def test_record_errors_have_a_reason_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("PATIENT NAME, which is no image")
    with pytest.raises(RecordError) as caught:
        load_image(ImageRef("image.png", str(tmp_path)))
    assert caught.value.reason == "image-unreadable"
    assert str(caught.value).startswith("image-unreadable") and "PATIENT" not in str(caught.value)
    assert str(RecordError("no-rejected")) == "no-rejected"


def test_ambiguous_sentence_is_reported_without_text() -> None:
    report = Report("No right pneumothorax, left effusion.", "")
    with pytest.raises(AmbiguousError) as caught:
        rewrite(load_graph(), report, "Pneumothorax", "s1", 42, 0)
    assert caught.value.reason == AMBIGUOUS and "effusion" not in str(caught.value)


def test_failing_writer_is_not_called_again() -> None:
    class FailingWriter(GraphWriter):
        calls = 0

        def write(self, graph: ConceptGraph, tasks: Sequence[Task]) -> Iterable[tuple[int, Draft]]:
            self.calls += len(tasks)
            return enumerate(GaveUpError("prompt-too-long", "9000 tokens") for _ in tasks)

    writer = FailingWriter()
    records = list(counterfactuals([study(OPACITY)], load_graph(), generator=writer))
    assert writer.calls == len(records) == 2
    assert [record.checks for record in records] == [{"prompt-too-long": False}] * 2


def test_interruption_has_its_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real signals are in tests/training/test_resume.py."""

    def stopped(args: object) -> None:
        raise Interrupted("saved x/checkpoint-7; continue with --resume_from_checkpoint auto")

    monkeypatch.setattr(train, "run", stopped)
    assert main(["train"]) == EXIT_STATUS == 3
    error = capsys.readouterr().err
    assert "checkpoint-7" in error and "--resume_from_checkpoint" in error
