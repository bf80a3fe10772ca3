"""The page of a run is complete, escaped, self-contained and private; a browser renders it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cpo_fast.errors import UsageError
from cpo_fast.report import write_comparison, write_report
from cpo_fast.report.__main__ import main
from cpo_fast.report.diff import word_diff
from cpo_fast.report.figures import running_mean
from cpo_fast.report.headline import list_inputs
from cpo_fast.report.read import read_run
from tests.report.samples import EDITED, HOSTILE, REPORT, Browser, write_run

GRAPH = Path(__file__).parents[2] / "cpo_fast" / "concepts" / "graph.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One run whose report contains markup that must stay text."""
    folder = tmp_path_factory.mktemp("runs") / "phantom"
    write_run(folder, report=f"FINDINGS: {HOSTILE} {REPORT}")
    shutil.copy(GRAPH, folder / "concept_graph.json")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def comparison(run) -> Path:
    other = write_run(run.parent / "other", seed=1, steps=40)
    return write_comparison([run, other], run.parent / "comparison.html")


class Elements(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_page_has_all_parts(run):
    page = Elements(run / "report.html")
    sections = {attrs.get("id") for tag, attrs in page.tags if tag == "section"}
    expected = {"evaluation", "examples", "stage-sft", "stage-cpo", "speed", "data", "graph"}
    assert expected | {"configuration"} <= sections
    for text in ("Majority guess", "Untrained", "no-findings-or-impression", "50000003", "BLEU-4",
                 "Logical tokens per second", "learning_rate", "2.13.0"):  # fmt: skip
        assert text in page.text
    accuracy = read_run(run).summary["evaluation"]["classification"]["cpo"]["macro"]["accuracy"]
    low, high = (f"{100 * bound:.1f}" for bound in accuracy["interval"])
    value = f"{100 * accuracy['value']:.1f}\u00a0%"
    assert f"CPO: {value} accuracy (95 % interval {low}–{high})" in page.text
    top = page.text[: page.text.index("Bold: significantly")]
    assert "Computed on Some GPU, 2 processes with cpo_fast 0.1.0, torch 2.13.0" in top


def test_records_trained_on_and_held_out_are_shown_separately(run):
    text = " ".join(Elements(run / "report.html").text.split())
    held = "CPO (SFT 1 600); 381 held out; of 2 000 read, 12 set aside"
    assert f"Records trained on1 590{held}" in text and "Records used" not in text
    assert "Trained on: SFT 1 600 Trained on: CPO 1 590 Held out: SFT 388 Held out: CPO 381" in text


def test_evaluation_names_its_model_on_top(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    figures = {"pairs": 1, "policy_accuracy": {"value": 1.0, "interval": [0.025, 1.0]}}
    evaluation = {"preference": {"checkpoint-9": figures}}
    (folder / "summary.json").write_text(json.dumps({"evaluation": evaluation}))
    config = {"model": "runs/x/cpo/checkpoint-9", "dataset": "pairs.jsonl", "suite": None}
    (folder / "config.json").write_text(json.dumps(config))
    text = Elements(write_report(folder)).text
    top = " ".join(text[: text.index("Preference for the chosen answer")].split())
    assert "cpo_fast · evaluation out model runs/x/cpo/checkpoint-9 · data set pairs.jsonl" in top
    assert "Chosen answer more likely100.0 %checkpoint-9, 1 pair, 2.5–100.0" in top


def test_hostile_text_is_escaped(run):
    page = Elements(run / "report.html")
    assert HOSTILE in page.text
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{}], "one inline script"
    assert not {"iframe", "link", "object", "base", "form"} & {t for t, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) > 20
    assert all(source.startswith("data:image/") for source in sources)
    html = (run / "report.html").read_text(encoding="utf-8")
    inline = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">" in html
    assert "content=\"default-src 'none'; img-src data:; " in html
    assert HOSTILE not in inline and "http" not in inline
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links and all(link.startswith("#") for link in links)


def test_every_table_has_a_csv_copy_and_cpo_first(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r'<figure class="table.*?</figure>', html, re.DOTALL)
    assert len(figures) > 8
    for figure in figures:
        assert figure.count('<button type="button" class="copy"') == 1 and "hidden" in figure
        text = unescape(figure.split("<pre>")[1].split("</pre>")[0])
        rows = list(csv.reader(io.StringIO(text)))
        assert len({len(row) for row in rows}) == 1 and len(rows) > 1
        heads = re.findall(r"<th scope=\"col\"[^>]*>(.*?)(?:<small>|</th>)", figure)
        if "CPO" in heads:
            assert heads[1] == "CPO", heads
        if "Untrained" in heads:
            assert heads[-1] == "Untrained", heads
        wide = figure.count('class="wide-only"') + figure.count(" wide-only")
        shown = len(heads) - bool(wide)
        assert 'stacked"' in figure.split(">")[0] or shown <= 4, "too wide for 390 pixels"
        assert bool(wide) == (len(heads) == 5 and heads[-1] == "Untrained")
    overall = next(f for f in figures if "Diagnosis, overall" in f)
    assert overall.index("<small>no answer parsed</small>") < overall.index("0.0\u00a0%")


def test_page_has_no_undefined_or_archaic_words(run):
    text = Elements(run / "report.html").text
    for words in (
        "Protocol B",
        "protocol B",
        "as if unshared",
        "can do",
        "told apart",
        "Where each",
    ):
        assert words not in text, words


def test_written_files_are_private_and_complete(run):
    assert (run / "report.html").stat().st_mode & 0o777 == 0o600
    figures = run / "figures"
    assert figures.stat().st_mode & 0o777 == 0o700
    names = {path.stem for path in figures.iterdir()}
    assert {"sft_loss", "cpo_loss", "cpo_reward_margin", "cpo_reward_accuracy", "accuracy", "f1",
            "concept_graph", "cpo_learning_rate", "cpo_grad_norm"} <= names  # fmt: skip
    for path in figures.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_mode & 0o777 == 0o600


def test_word_diff_marks_changes_and_loses_no_text():
    before, after = word_diff(REPORT, EDITED)
    assert "".join(text for _, text in before) == REPORT
    assert "".join(text for _, text in after) == EDITED
    kept = "".join(text for changed, text in after if not changed)
    assert "The cardiac silhouette is mildly enlarged." in kept
    assert "pneumothorax" not in kept
    assert not any("\n" in text for changed, text in after if changed)
    comma, no_comma = word_diff("no effusion, edema", "no effusion or edema")
    assert comma == [(False, "no effusion"), (True, ","), (False, " "), (False, "edema")]
    assert no_comma == [(False, "no effusion "), (True, "or"), (False, " "), (False, "edema")]
    assert word_diff("  a", "b\n") == (
        [(False, "  "), (True, "a")],
        [(True, "b"), (False, "\n")],
    )
    assert word_diff("same words", "same words") == ([(False, "same words")],) * 2
    assert word_diff("", "new ") == ([], [(True, "new"), (False, " ")])


def test_running_mean_preserves_lines_and_smooths_noise():
    line = [2.0 * i for i in range(100)]
    assert running_mean(line)[10:90] == pytest.approx(line[10:90])
    assert running_mean([1.0, -1.0] * 50)[50] == pytest.approx(0, abs=0.25)


def test_run_without_a_summary_gets_a_page(tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    row = {"stage": "cpo", "step": 1, "loss": 0.6931, "grad_norm": None}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + '\n{"stage": "cpo", "st')
    page = Elements(write_report(folder))
    assert "summary.json is missing" in page.text
    assert "metrics.jsonl: 1 damaged line left out" in page.text
    assert [path.name for path in (folder / "figures").iterdir()] == ["cpo_loss.png"]
    before = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == before


def test_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"neither metrics\.jsonl nor summary\.json"):
        write_report(tmp_path)
    assert main([str(tmp_path / "gone")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_damaged_concept_graph_is_noted(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text('{"data": {"read": 3, "used": 2}}')
    (folder / "concept_graph.json").write_text("{}")
    assert "concept_graph.json cannot be drawn" in Elements(write_report(folder)).text


def test_values_of_a_wrong_type_leave_gaps(tmp_path):
    folder = tmp_path / "$run"
    folder.mkdir()
    good = {"support": 3, "accuracy": {"value": 0.5, "interval": [0.2, "high"]}, "f1": None}
    models = {"majority": {"findings": {"$\\frac{": good}}, "cpo": {"macro": [1]}, "sft": 3}
    evaluation = {"classification": models, "text": [], "preference": {"cpo": {}}}
    data = {"read": "many", "used": 2, "rejected": 7}
    summary = {"evaluation": evaluation, "data": data, "stages": {"cpo": []}}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"stage": "$\\frac{", "step": 10**400, "loss": 1},
        {"stage": "cpo", "step": 2, "loss": "x"},
        {"stage": "$\\frac{", "step": 1, "loss": 2.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = [{"labels": 3, "answers": [1], "report": "word " * 9000, "image": 5}, "none"]
    (folder / "evaluation.json").write_text(json.dumps({"examples": examples}))
    page = Elements(write_report(folder))
    assert "$\\frac{" in page.text and "50.0" in page.text
    assert "The image is not shown (image-missing)" in page.text


def test_page_names_the_initial_checkpoint(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    assert any(text.startswith("model ") for text in list_inputs(read_run(folder)))
    config |= {"sft_checkpoint": "runs/sft/sft"}
    (folder / "config.json").write_text(json.dumps(config))
    found = list_inputs(read_run(folder))
    assert "from the SFT checkpoint runs/sft/sft" in found
    assert not any(text.startswith("model ") for text in found), "the flag has no effect"


def test_pages_have_no_empty_section(run, tmp_path):
    def write(name: str, **row: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1} | row))
        return folder

    runs = [write("a", stage="sft", epoch=1), write("b", stage="cpo", **{"rewards/chosen": 0.5})]
    page = Elements(write_comparison(runs, tmp_path / "comparison.html"))
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == ["configuration"]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == ["#configuration"]
    page = Elements(write_report(runs[0]))
    assert not any("stage-sft" in str(attrs) for _, attrs in page.tags), "no curve of the stage"


@pytest.mark.parametrize(
    ("given", "used", "unused"),
    [
        ({"dataset": "pairs.jsonl", "suite": None}, "beta", "max_new_tokens batch_size split"),
        ({"dataset": "chexpert.csv.gz", "suite": None}, "max_new_tokens", "beta num_examples"),
        ({"dataset": "mimic", "suite": ["report"]}, "max_new_tokens", "beta drift_samples"),
        ({"dataset": "mimic", "suite": ["report", "drift"]}, "drift_samples", "packing_length"),
    ],
)
def test_evaluation_shows_only_settings_with_effect(tmp_path, given, used, unused):
    settings = ("beta", "max_new_tokens", "batch_size", "split", "num_examples", "drift_samples",
                "packing_length")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(settings, 7) | given))
    (tmp_path / "summary.json").write_text('{"evaluation": {}, "data": {"used": 3}}')
    html = write_report(tmp_path).read_text(encoding="utf-8")
    shown = set(re.findall(r"<dt>(.*?)</dt>", html))
    assert {"dataset", used} <= shown and not shown & set(unused.split())


@pytest.mark.parametrize("absolute", [False, True])
def test_path_is_printed_as_given(run, tmp_path, monkeypatch, capsys, absolute):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text('{"data": {"used": 3}}')
    monkeypatch.chdir(tmp_path)
    start = tmp_path if absolute else Path()
    assert main([str(start / "a")]) == 0 and main([str(start / "a"), str(start / "b")]) == 0
    assert capsys.readouterr().out.split() == [
        str(start / "a" / "report.html"), str(start / "comparison.html")]  # fmt: skip
    monkeypatch.chdir(tmp_path / "a")
    assert main([".", "../b"]) == 0
    assert capsys.readouterr().out.split() == ["../comparison.html"], "beside the run"


def test_comparison_refuses_a_folder_as_output(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(run), str(run), "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert f"--output {tmp_path}: a folder" in capsys.readouterr().err
    assert not list(tmp_path.parent.glob(".*.partial"))


def test_speed_of_sft_is_in_samples(comparison):
    text = Elements(comparison).text
    assert "SFT: samples per second" in text and "CPO: pairs per second" in text
    assert "SFT: pairs per second" not in text


def test_comparison_shows_differences(comparison, run):
    page = Elements(comparison)
    assert "phantom" in page.text and "other" in page.text
    assert page.text.split("comparison")[0].strip().endswith("cpo_fast ·"), "no kind of data"
    assert re.search(r"seed\s*42\s*43", page.text)
    assert "learning_rate" not in page.text, "equal flags are not shown"
    assert comparison.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="at least two"):
        write_comparison([run], comparison)


NO_BROWSER = "no Chromium on this machine: apt-get install chromium"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if Browser.PATH is None:
        pytest.skip(NO_BROWSER)
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["run", "comparison"])
def test_browser_renders_pages_without_errors(browser, run, comparison, which, width):
    page = run / "report.html" if which == "run" else comparison
    browser.open(page.as_uri(), width, dark=width == 390)
    complaints = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in browser.events if event["method"] in complaints] == []
    requested = [event["params"]["request"]["url"] for event in browser.events
             if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert {url.split(":", 1)[0] for url in requested} == {"file", "data"}
    assert [url for url in requested if url.startswith("file")] == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    drawn = "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
    assert browser.evaluate(drawn) == browser.evaluate("document.images.length") > 5
    shown = """[...document.querySelectorAll('.panel img')].filter(i => i.offsetWidth)
        .map(i => i.className)"""
    assert set(browser.evaluate(shown)) == {"dark" if width == 390 else "light"}
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert set(browser.evaluate(shown)) == {"light"}, "print is always light"
    browser.ask("Emulation.setEmulatedMedia", media="")
    # No table scrolls horizontally, and nothing is wider than the page.
    scrolled = """[...document.querySelectorAll('.scroll')].filter(e =>
        e.scrollWidth > e.clientWidth).map(e => e.getAttribute('aria-label'))"""
    assert browser.evaluate(scrolled) == []
    outside = """[...document.querySelectorAll('main *')].filter(e =>
        e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.className)"""
    assert browser.evaluate(outside) == []
    shown = "[...document.querySelectorAll('button.copy')].filter(b => b.offsetWidth).length"
    assert browser.evaluate(shown) == browser.evaluate("document.querySelectorAll('table').length")
    browser.evaluate("document.querySelector('button.copy').click()")
    status = "document.querySelector('.csv [role=status]').textContent"
    for _ in range(50):
        if text := browser.evaluate(status):
            break
    assert text.startswith(("Copied", "Selected"))


@pytest.mark.parametrize(("smooth", "names"), [(True, ["training, running mean"]), (False, [])])
def test_smoothed_curves_say_so(smooth, names):
    from matplotlib.figure import Figure

    from cpo_fast.report.figures import LIGHT, Line, curves

    axes = Figure().add_subplot()
    line = Line("training", range(100), [float(i) for i in range(100)])
    curves("loss", "loss", [line], smooth=smooth).draw(axes, LIGHT)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == names if smooth else legend is None
    assert len(axes.lines) == (2 if smooth else 1)
