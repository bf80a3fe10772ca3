"""Report sections: one synthetic text per layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.data.sections import MAX_REPORT_CHARS, indication, parse_report
from cpo_fast.errors import RecordError
from cpo_fast.types import Report

CASES = [
    json.loads(line)
    for line in (Path(__file__).with_name("sections.jsonl")).read_text().splitlines()
]
"""Synthetic reports and their sections; `either`: the two names can be exchanged."""

LINE = " " + "_" * 78
TITLE = " " * 33 + "FINAL REPORT\n"


def report(*lines: str) -> str:
    return TITLE + "\n".join(lines) + "\n"


def test_findings_and_impression_with_wrapping_undone() -> None:
    text = report(
        " EXAMINATION:  CHEST (PA AND LAT)", "",
        " INDICATION:  ___F with cough // pneumonia?", "",
        " COMPARISON:  ___ at 10:30.", "",
        " FINDINGS: ", "",
        " The lungs are clear and the heart is of normal size. The mediastinum at 10:30",
        " was ___ wide.  There is no",
        " effusion.", "",
        " Bones are intact.", "",
        " IMPRESSION: ", "",
        " No acute process.",
    )  # fmt: skip
    assert parse_report(text) == Report(
        "The lungs are clear and the heart is of normal size. The mediastinum at 10:30 "
        "was ___ wide. There is no effusion. Bones are intact.",
        "No acute process.",
    )
    assert indication(text) == "___F with cough // pneumonia?"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_other_systems_are_read(end: str) -> None:
    text = report(" FINDINGS: Clear", " lungs.", "", " IMPRESSION: Normal.").replace("\n", end)
    assert parse_report(text) == Report("Clear lungs.", "Normal.")


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_sections_of_every_layout(case: dict) -> None:
    right = case["right"]
    parsed = parse_report(case["report"])
    got = [parsed.findings, parsed.impression]
    expected = [right["findings"], right["impression"]]
    assert got in ([expected, expected[::-1]] if right.get("either") else [expected])


@pytest.mark.parametrize(
    "text",
    [" DR. ___\n", " Findings were discussed with Dr. ___ by telephone.\n", " ___, M.D.\n",
     " HISTORY: Cough.\n\n Dr. ___ was paged at 3 pm.\n",
     " PRIOR FINDINGS: Pneumothorax.\n", " CRITICAL FINDINGS: Dr. ___ was called.\n",
     " FINDINGS: Discussed with Dr. ___ at 3 pm.\n"],
)  # fmt: skip
def test_notes_about_communication_are_not_a_report(text: str) -> None:
    with pytest.raises(RecordError, match="no-findings-or-impression"):
        parse_report(TITLE + text)


@pytest.mark.parametrize("place", ["above", "below"])
def test_indication_of_an_addendum_is_ignored(place: str) -> None:
    body = report(" INDICATION: Cough.", "", " FINDINGS: Clear.")
    addendum = " ADDENDUM:\n INDICATION: Fever.\n"
    parts = (addendum, body) if place == "above" else (body, addendum)
    assert indication(f"{LINE}\n".join(parts)) == "Cough."


@pytest.mark.parametrize(
    "header", ["FINDINGS", "FINDNGS", "FINIDNGS", "FINDING", "CHEST FINDINGS", "Findings"]
)
def test_spellings_of_findings(header: str) -> None:
    assert parse_report(report(f" {header}: Clear lungs.")) == Report("Clear lungs.")


@pytest.mark.parametrize(
    "header",
    ["IMPRESSION", "IMPRESSON", "IMPRESION", "IMPRSSION", "IMPRESSIONS", "CONCLUSION", "SUMMARY",
     "FINAL IMPRESSION", "IMPRESSION (PRELIMINARY)", "Impression", "OPINION"],
)  # fmt: skip
def test_spellings_of_impression(header: str) -> None:
    text = report(" FINDINGS: Clear lungs.", f" {header}: Normal.")
    assert parse_report(text) == Report("Clear lungs.", "Normal.")


@pytest.mark.parametrize("header", ["FINDINGS AND IMPRESSION", "IMPRESSION/FINDINGS"])
def test_one_section_for_both_counts_as_findings(header: str) -> None:
    assert parse_report(report(f" {header}: All clear.")) == Report("All clear.")


@pytest.mark.parametrize(
    "header",
    ["PORTABLE CHEST", "PA AND LATERAL VIEWS OF THE CHEST", "CHEST, 2 VIEWS", "AP CHEST",
     "FRONTAL AND LATERAL CHEST RADIOGRAPHS", "CHEST RADIOGRAPH [PORTABLE]"],
)  # fmt: skip
def test_section_named_after_the_view_counts_as_findings(header: str) -> None:
    text = report(
        " HISTORY: Cough.", "", f" {header}: The heart is large.", "", " IMPRESSION: Big."
    )
    assert parse_report(text) == Report("The heart is large.", "Big.")


def test_headers_of_body_parts_stay_in_the_findings() -> None:
    text = report(
        " TECHNIQUE: PA view.", "",
        " FINDINGS: Comparison is made with ___.", "",
        " LUNGS: Clear.", " HEART: Large.", "",
        " CHEST: No effusion.", "",
        " IMPRESSION:", " LEFT: Normal.", "",
        " DICTATED BY: Dr. ___",
    )  # fmt: skip
    assert parse_report(text) == Report(
        "Comparison is made with ___. LUNGS: Clear. HEART: Large. CHEST: No effusion.",
        "LEFT: Normal.",
    )
    assert parse_report(report(" HISTORY: x", "", " LUNGS: Clear.")) == Report("LUNGS: Clear.")


def test_view_section_does_not_replace_findings() -> None:
    text = report(" PORTABLE CHEST: One view.", "", " FINDINGS: The heart is large.")
    assert parse_report(text) == Report("The heart is large.")


def test_one_section_is_enough() -> None:
    assert parse_report(report(" IMPRESSION: Normal.")) == Report("", "Normal.")
    assert parse_report(report(" FINDINGS: Clear.", "", " IMPRESSION: ")) == Report("Clear.", "")


def test_addendum_and_wet_read_above_the_line_are_skipped() -> None:
    body = report(" FINDINGS: Clear.", "", " IMPRESSION: Normal.")
    addendum = " ADDENDUM  The FINDINGS: were discussed with Dr. ___ at 5 PM.\n"
    for above in (addendum, " WET READ: ___ ___ 10:20 PM\n  Left effusion.\n"):
        assert parse_report(above + LINE + "\n" + body) == Report("Clear.", "Normal.")


def test_wet_read_is_used_if_alone() -> None:
    assert parse_report(" WET READ: Left effusion.\n") == Report("Left effusion.")


def test_line_at_the_end_is_ignored() -> None:
    text = report(" FINDINGS: Clear.") + LINE + "\n"
    assert parse_report(text) == Report("Clear.")


def test_deidentified_lines_do_not_end_an_addendum() -> None:
    text = report(" FINDINGS: Clear.", " ___", " Still clear.")
    assert parse_report(text) == Report("Clear. ___ Still clear.")


def test_last_paragraph_replaces_missing_sections() -> None:
    text = report(
        " HISTORY: Cough.", "",
        " Comparison is made with ___.", "",
        " The lungs are clear", " and the heart is normal.", "",
        " RECOMMENDATION(S): None.", "",
        " NOTIFICATION: Dr. ___ was called.",
    )  # fmt: skip
    assert parse_report(text) == Report("The lungs are clear and the heart is normal.")


def test_repeated_sections_are_joined() -> None:
    text = report(" FINDINGS: First.", "", " IMPRESSION: One.", "", " FINDINGS: Second.")
    assert parse_report(text) == Report("First. Second.", "One.")


def test_capitals_inside_a_sentence_are_not_a_header() -> None:
    text = report(
        " FINDINGS: The tip of the ET tube, see", " previous report: unchanged. IMPRESSION"
    )
    assert parse_report(text).findings.endswith("see previous report: unchanged. IMPRESSION")


@pytest.mark.parametrize(
    "text",
    ["", "\n \n", TITLE, report(" INDICATION: Cough."), report(" FINDINGS: ", " IMPRESSION: ___"),
     report(" HISTORY: x", " TECHNIQUE: y")],
)  # fmt: skip
def test_reports_without_content_are_set_aside(text: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_report(text)
    assert caught.value.reason == "no-findings-or-impression"


def test_rule_of_the_authors_needs_both_headers() -> None:
    text = report(" FINDINGS: Clear", " lungs.", "", " IMPRESSION: Normal.")
    assert parse_report(text, "authors") == Report("Clear lungs.")
    for other in (" IMPRESSION: Normal.", " FINDINGS: IMPRESSION: Normal.", " FINDINGS: Clear."):
        with pytest.raises(RecordError) as caught:
            parse_report(report(other), "authors")
        assert caught.value.reason == "no-findings-or-impression"


def test_unknown_rule_and_long_text_are_refused() -> None:
    with pytest.raises(ValueError, match="careful"):
        parse_report("FINDINGS: x", "sloppy")
    with pytest.raises(RecordError) as caught:
        parse_report("FINDINGS: " + "x" * MAX_REPORT_CHARS)
    assert caught.value.reason == "report-too-long"


PIECES = st.sampled_from(
    [
        "FINDINGS:",
        " IMPRESSION:",
        "CHEST:",
        "\n",
        "\n\n",
        LINE,
        " ",
        "___",
        "A",
        "Clear.",
        "\r",
        ":",
    ]
)


@given(st.lists(st.one_of(PIECES, st.text(max_size=20)), max_size=30).map("".join))
def test_any_text_gives_sections_or_a_reason(text: str) -> None:
    for rule in ("careful", "authors"):
        try:
            parsed = parse_report(text, rule)
        except RecordError as error:
            assert error.reason == "no-findings-or-impression"
        else:
            for part in (parsed.findings, parsed.impression):
                assert part == " ".join(part.split())
            assert parsed.text


def test_long_runs_of_capitals_take_linear_time() -> None:
    # A naive header pattern backtracks on each of these and does not end.
    runs = ("A" * 190_000, "A " * 95_000, ("A, " * 40 + "\n") * 1500, "\n " * 90_000,
            "called " * 28_000, "FINDINGS\n" * 20_000, "FINDINGS: x\nCOMPARISON: y\n" * 7_000,
            "FINDINGS: COMPARISON: " + "None. " * 30_000, "Dr. " * 48_000,
            ".  " * 60_000, " " * 190_000, "FINDINGS:" + " IMPRESSION: a" * 12_000)  # fmt: skip
    for run in runs:
        try:
            parse_report(run)
        except RecordError as error:
            assert error.reason == "no-findings-or-impression"
