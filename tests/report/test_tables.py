"""Tables of a report: paired differences, bold cells, headline, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.evaluation.summary import build_summary
from cpo_fast.report.evaluation_tables import clear_best, evaluation_tables
from cpo_fast.report.headline import cards, headline
from cpo_fast.report.read import Run
from cpo_fast.report.run_tables import comparison_tables
from cpo_fast.report.tables import Cell, Row, Table, in_order, table_csv, table_markdown

NAMES = ("Edema", "Pneumonia")


def answer_with(name: str) -> str:
    return f"<think> a </think> The disease of this patient is {name}."


def evaluation(*, cpo_wrong: int, sft_wrong: int, unparsed: int = 0, studies: int = 80) -> Any:
    """CPO errs on the first studies, SFT on the last; `unparsed` CPO answers are truncated."""
    truth = [(NAMES[i % 2],) for i in range(studies)]
    other = [answer_with(NAMES[(i + 1) % 2]) for i in range(studies)]
    right = [answer_with(NAMES[i % 2]) for i in range(studies)]
    cpo = other[:cpo_wrong] + right[cpo_wrong:]
    cpo[studies // 2 : studies // 2 + unparsed] = ["<think> a"] * unparsed
    return build_summary(
        truth=truth,
        training_truth=[("Edema",)] * 3,
        answers={
            "untrained": ["?"] * studies,
            "sft": right[: studies - sft_wrong] + other[studies - sft_wrong :],
            "cpo": cpo,
        },
        bootstrap=300,
    )


def pick(evaluation: Any, caption: str) -> Table:
    return next(t for t in evaluation_tables(evaluation) if t.caption == caption)


def find_bold(table: Table) -> set[str]:
    """The columns with a bold cell."""
    return {table.columns[i + 1] for r in table.rows for i, c in enumerate(r.cells) if c.best}


def test_insignificant_difference_is_named_and_not_bold() -> None:
    found = evaluation(cpo_wrong=4, sft_wrong=5)
    text = headline(found)
    figure = found["differences"]["cpo - sft"]["accuracy"]
    assert figure["interval"][0] < 0 < figure["interval"][1]
    low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in figure["interval"])
    assert text.startswith(
        "CPO compared with SFT: no significant difference in accuracy, "
        f"+{100 * figure['value']:.1f} points ({low} to {high}); no significant difference in F1"
    )
    assert f"{100 * found['classification']['sft']['macro']['accuracy']['value']:.1f}" not in text
    for caption in ("Diagnosis, overall", "Accuracy per finding", "F1 per finding"):
        assert find_bold(pick(found, caption)) == set(), caption
    rows = {row.head: row for row in pick(found, "Differences").rows}
    assert not any(cell.best for cell in rows["CPO − SFT"].cells)
    assert all(cell.best for cell in rows["CPO − Untrained"].cells)
    (accuracy, *_) = cards(Run(None, summary={"evaluation": found}))  # type: ignore[arg-type]
    assert accuracy["note"].endswith("no significant difference")


@pytest.mark.parametrize(("cpo_wrong", "sft_wrong", "word", "best"),
                         [(2, 30, "higher", "CPO"), (30, 2, "lower", "SFT")])  # fmt: skip
def test_significant_difference_has_a_direction(cpo_wrong, sft_wrong, word, best) -> None:
    found = evaluation(cpo_wrong=cpo_wrong, sft_wrong=sft_wrong)
    assert f"CPO compared with SFT: significantly {word} accuracy, " in headline(found)
    assert find_bold(pick(found, "Diagnosis, overall")) == {best}
    assert find_bold(pick(found, "Accuracy per finding")) == {best}


def test_paired_difference_decides_for_overlapping_intervals() -> None:
    a, b = {"value": 0.9, "interval": [0.8, 0.95]}, {"value": 0.85, "interval": [0.7, 0.92]}
    assert clear_best({"a": a, "b": b}) is None
    assert clear_best({"a": a, "b": b}, {"a - b": {"value": 0.05, "interval": [0.01, 0.1]}}) == 0
    assert clear_best({"b": b, "a": a}, {"b - a": {"value": -0.05, "interval": [-0.1, -0.01]}}) == 1
    assert clear_best({"a": a, "b": b}, {"a - b": {"value": 0.05, "interval": [-0.1, 0.1]}}) is None
    low = {"value": 0.3, "interval": [0.2, 0.4]}
    assert clear_best({"a": low, "b": b}) == 1, "intervals that do not overlap"
    assert clear_best({"a": {"value": 1.0}, "b": b}) is None, "no interval"
    assert clear_best({"a": a}) is None and clear_best({"a": a, "b": a}) is None


def test_unparsed_answers_are_noted_beside_the_figures() -> None:
    found = evaluation(cpo_wrong=4, sft_wrong=5, unparsed=20)
    for caption in ("Diagnosis, overall", "Accuracy per finding", "F1 per finding"):
        shown = pick(found, caption)
        assert shown.columns == ("", "CPO", "SFT", "Majority guess", "Untrained")
        assert shown.column_notes == ("", "25.0\u00a0% not parsed", "", "", "no answer parsed")
        assert "counts as wrong for every finding" in shown.note
    assert headline(found).endswith(
        "25.0\u00a0% of its answers cannot be parsed and count as wrong."
    )
    rows = {row.head: row.note for row in pick(found, "Differences").rows}
    assert rows["SFT − Untrained"] == "Untrained: no answer parsed"
    found["classification"]["cpo"] |= {"unparsable": 80}
    assert headline(found) == (
        "No answer of CPO can be parsed, so there is no accuracy to compare."
    )


def test_markdown_has_bold_cells() -> None:
    markdown, note = table_markdown(pick(evaluation(cpo_wrong=2, sft_wrong=30), "Differences"))
    assert "Bold: the interval excludes 0" in note and "| CPO − SFT | **+" in markdown
    overall, _ = table_markdown(pick(evaluation(cpo_wrong=2, sft_wrong=30), "Diagnosis, overall"))
    assert "| Untrained (no answer parsed) |" in overall


def test_sources_of_one_model_are_not_ranked() -> None:
    high, low = ({"value": v, "interval": [v, v]} for v in (0.9, 0.5))
    sources = {"thinking": {"accuracy": high, "pairs": 3}, "perception": {"accuracy": low}}
    one = {"pairs": 9, "accuracy": low, "sources": sources, "split": "validate"}
    (shown,) = evaluation_tables({"preference": {"cpo": one}})
    assert shown.columns == ("", "CPO", "CPO, thinking", "CPO, perception")
    assert find_bold(shown) == set() and shown.note.startswith("Held-out pairs.")
    (alone,) = evaluation_tables({"preference": {"x": {"pairs": 9, "policy_accuracy": high}}})
    assert "eward" not in str(alone), "there is no reference"


def test_sft_has_a_column_beside_cpo() -> None:
    high, low = ({"value": v, "interval": [v, v]} for v in (0.9, 0.5))
    of_sft = {"pairs": 9, "policy_accuracy": low, "split": "validate"}
    of_cpo = {"pairs": 9, "policy_accuracy": high, "accuracy": high, "split": "validate"}
    (shown,) = evaluation_tables({"preference": {"sft": of_sft, "cpo": of_cpo}})
    assert shown.columns == ("", "CPO", "SFT")
    cells = {row.head: [cell.text for cell in row.cells] for row in shown.rows}
    assert cells["Chosen answer more likely"] == ["90.0\u00a0%", "50.0\u00a0%"]
    assert cells["Reward accuracy"] == ["90.0\u00a0%", "–"]
    summed = (
        "summed over the tokens of an answer and not divided by its length, which favours short"
    )
    assert summed in shown.note
    run = Run(Path("run"), summary={"evaluation": {"preference": {"sft": of_sft, "cpo": of_cpo}}})
    (last, *_) = comparison_tables([run], ["run"])
    (reward,) = [row for row in last.rows if row.head == "Held-out reward accuracy"]
    assert [cell.text for cell in reward.cells] == ["90.0\u00a0%"]


def test_systems_have_a_fixed_order() -> None:
    assert in_order(["majority", "untrained", "other", "sft", "cpo"]) == [
        "cpo", "sft", "other", "majority", "untrained"]  # fmt: skip


def test_protocol_letters_are_defined_in_their_table() -> None:
    figures = {"A": {"micro": {"value": 0.5, "interval": [0.4, 0.6]}}, "B": {}}
    (shown,) = evaluation_tables({"ms_cxr_t": {"cpo": figures}})
    assert shown.columns == ("", "Progression, micro", "Progression, macro", "Presence")
    assert "Progression (protocol A): improving, stable or worsening" in shown.note


def test_csv_has_plain_numbers_separate_notes_and_no_formulas() -> None:
    rows = (
        Row("F1, pooled", (Cell("90.1\u00a0%", "88.0–92.1"), Cell("−0.70"), Cell("–"))),
        Row(
            '=cmd|"x"', (Cell("12\u202f345"), Cell("-x"), Cell("+0.1", "−0.7 to +0.9")), "3 studies"
        ),
    )
    shown = Table("", ("", "CPO", "SFT", "Untrained"), rows,
                  column_notes=("", "", "", "no answer parsed"))  # fmt: skip
    assert list(csv.reader(io.StringIO(table_csv(shown)))) == [
        ["", "Note", "CPO", "CPO: interval or note", "SFT", "Untrained (no answer parsed)",
         "Untrained: interval or note"],
        ["F1, pooled", "", "90.1%", "88.0 to 92.1", "-0.70", "", ""],
        ["'=cmd|\"x\"", "3 studies", "12345", "", "'-x", "+0.1", "-0.7 to +0.9"],
    ]  # fmt: skip
