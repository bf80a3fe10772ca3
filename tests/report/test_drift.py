"""The drift probe on the page: heat map, curve, bars, table; damaged entries are skipped."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cpo_fast.concepts import load_graph
from cpo_fast.evaluation.drift import Drift, Effect, Swap, drift_example, find_swaps
from cpo_fast.report import write_report
from cpo_fast.report.drift import numbers, prepare_drift
from tests.report.samples import HOSTILE, write_run

FINDINGS = ("Edema", "Pneumonia")


def build_example(word: str = " opacity") -> dict:
    rows = np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.7, 0.3]])
    probed = Drift(FINDINGS, ("<think>", word, "."), rows)
    effects = []
    for kind, z in (("synonym", [0.6, 0.4]), ("side", [0.7, 0.3]), ("negation", [0.1, 0.9])):
        swap = Swap(kind, f"{kind} {word}", "another", "text")
        moved = abs(z[0] - 0.7)
        effects.append(Effect(swap, np.array(z), moved, moved / 2))
    return drift_example("s50000001", probed, rows[-1], effects)


def test_probed_study_has_tokens_figures_and_a_table():
    shown = prepare_drift(json.loads(json.dumps(build_example())), 1)
    assert shown is not None and shown.swaps is not None
    assert [token.heat for token in shown.tokens] == ["0.000", "1.000", "0.500"]
    assert [panel.slug for panel in shown.panels] == [
        "drift_1_curve", "drift_1_keeps", "drift_1_changes"]  # fmt: skip
    assert "0.400, is at token 2" in shown.panels[0].alt
    assert shown.panels[1].title == "synonym  opacity → another", "largest change of equal meaning"
    first = shown.swaps.rows[0]
    assert first.note == "negation" and first.cells[-1].text == "Pneumonia"


@pytest.mark.parametrize(
    "damage",
    [{"tokens": []}, {"variation": [0.1]}, {"end": None}, {"findings": "Edema"},
     {"divergence": ["x", 1, 2]}],
)  # fmt: skip
def test_damaged_entries_are_skipped(damage):
    assert prepare_drift(build_example() | damage, 1) is None
    assert numbers([1, True]) == [] and numbers([1, 2.5]) == [1.0, 2.5]


def test_page_escapes_the_probe(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    path = run / "evaluation.json"
    found = json.loads(path.read_text())
    entries = [{"model": HOSTILE} | build_example(HOSTILE), {"tokens": 3}]
    path.write_text(json.dumps(found | {"drift": entries}))
    page = write_report(run).read_text()
    assert 'id="drift"' in page and "--heat:1.000" in page
    assert page.count("<script>") == 1 and "onerror=boom()>" not in page
    for name in ("curve", "keeps", "changes"):
        assert (run / "figures" / f"drift_1_{name}.png").stat().st_mode & 0o777 == 0o600


def test_hallmarks_are_replaced_where_they_are_asserted():
    graph = load_graph()
    disease = graph.diseases["Pneumothorax"]
    phrase = next(p for h in disease.hallmarks for p in graph.attributes[h].phrases)
    swaps = [s for s in find_swaps(f"There is {phrase}.", graph) if s.kind == "hallmark"]
    assert swaps
    foreign = [p.lower() for d in graph.diseases.values() if d.name != "Pneumothorax"
               for h in d.hallmarks for p in graph.attributes[h].phrases]  # fmt: skip
    assert all(swap.after.lower() in foreign for swap in swaps)
    assert all(swap.text != f"There is {phrase}." for swap in swaps)
    denied = find_swaps(f"There is no {phrase}.", graph)
    assert not [s for s in denied if s.kind == "hallmark"]
    assert not [s for s in find_swaps(f"There is {phrase}.") if s.kind == "hallmark"]
