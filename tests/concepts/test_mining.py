"""Mining edges from a synthetic corpus; merging an extraction by an LLM."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.concepts import load_graph
from cpo_fast.concepts.__main__ import main
from cpo_fast.concepts.extraction import merge_extraction
from cpo_fast.concepts.graph import read_graph_json
from cpo_fast.concepts.mine import (
    Miner,
    add_weights,
    collect_evidence,
    fisher,
    mine,
    propose_changes,
)
from cpo_fast.errors import DataError
from tests.counterfactual.samples import REPORTS, write_open_i

GRAPH = load_graph()
MINER = Miner(GRAPH)
CORPUS = (
    ["Cardiomegaly with peribronchial cuffing. No effusion."] * 40
    + ["The heart is normal. The lungs are clear."] * 300
    + ["Right lower lobe pneumonia. Possible atelectasis."] * 60
    + ["Emphysema with hyperinflation."] * 60
)


def test_mentions_are_asserted_denied_or_uncertain() -> None:
    found = Miner(GRAPH).mentions("No cavity. Possible air bronchograms. Hyperinflated lungs.")
    assert found == {"Lung Lesion": 0, "M8": 0, "D4": -1, "F2": 1}
    assert Miner(GRAPH).mentions("No edema. Mild edema.")["Edema"] == 1


def test_normal_statements_deny_unnamed_attributes() -> None:
    miner = Miner(GRAPH)
    assert miner.mentions("Heart size is normal. Trachea is midline.") == {"M14": 0, "A9": 0}
    assert miner.mentions("Costophrenic angles are sharp.") == {"M11": 0}
    assert miner.mentions("The lungs are not clear.") == {}
    assert miner.mentions("Normal heart. Mild cardiomegaly.")["M14"] == 1


@pytest.mark.parametrize("key", GRAPH.attributes)
def test_every_phrase_of_an_attribute_is_found(key: str) -> None:
    for phrase in GRAPH.attributes[key].phrases:
        assert key in MINER.mentions(f"There is {phrase.replace('...', ' of the ')}.")


def test_counts_and_evidence() -> None:
    counts = mine(read_graph_json(), CORPUS)
    assert counts.reports == len(CORPUS)
    assert counts.nodes["Cardiomegaly"] == counts.nodes["D8"] == 40
    assert counts.pairs["Cardiomegaly", "D8"] == 40
    assert counts.denied["Pleural Effusion"] == 40
    assert counts.uncertain["Atelectasis"] == 60
    edges = {(e.left, e.right): e for e in collect_evidence(GRAPH, counts)}
    together = edges["Cardiomegaly", "D8"]
    assert together.expected == pytest.approx(40 * 40 / 460)
    assert together.pmi == pytest.approx(math.log2(460 / 40))
    assert together.p_association < 1e-30 and together.p_exclusion == pytest.approx(1)
    apart = edges["Emphysema", "Pneumonia"]
    assert apart.together == 0 and apart.p_exclusion < 1e-3


def test_proposals_add_and_exclude_for_review() -> None:
    edges = collect_evidence(GRAPH, mine(read_graph_json(), CORPUS))
    rows = {
        (row["left"], row["right"]): row["change"]
        for row in propose_changes(edges, confidence=0.95)
    }
    assert rows["Cardiomegaly", "D8"] == "add association"
    assert rows["Emphysema", "Pneumonia"] == "add exclusion"
    assert ("Emphysema", "F2") not in rows  # already known
    weighted = add_weights(GRAPH, edges).network.edges["Emphysema", "F2"]
    assert weighted["relation"] == "association" and weighted["together"] == 60
    assert "together" not in GRAPH.network.edges["Emphysema", "F2"]


def test_counts_do_not_depend_on_the_number_of_workers() -> None:
    assert mine(read_graph_json(), iter(CORPUS), 1) == mine(read_graph_json(), iter(CORPUS), 2)


@given(st.integers(0, 12), st.integers(1, 12), st.integers(1, 12), st.integers(12, 30))
def test_fisher_is_the_hypergeometric_tail(x: int, a: int, b: int, n: int) -> None:
    low, high = max(0, a + b - n), min(a, b)
    x = min(max(x, low), high)
    ways = [math.comb(b, k) * math.comb(n - b, a - k) for k in range(low, high + 1)]
    (below,), (above,) = fisher([x], [a], [b], n)
    assert below == pytest.approx(sum(ways[: x - low + 1]) / sum(ways), rel=1e-12)
    assert above == pytest.approx(sum(ways[x - low :]) / sum(ways), rel=1e-12)


def test_command_mines_a_folder(tmp_path: Path) -> None:
    data = write_open_i(tmp_path / "reports", REPORTS)
    output = tmp_path / "mined.json"
    assert main(["mine", "--dataset", str(data), "--output", str(output), "--workers", "1"]) == 0
    mined = json.loads(output.read_text())
    assert mined["reports"] == len(REPORTS)
    assert mined["asserted"]["Emphysema"] == 1
    assert "clavicle" not in output.read_text()


@pytest.mark.parametrize("suffix", ["graphml", "json"])
def test_command_writes_the_weighted_graph(suffix: str, tmp_path: Path) -> None:
    import networkx

    data = write_open_i(tmp_path / "reports", REPORTS)
    graph = tmp_path / f"graph.{suffix}"
    command = ["mine", "--dataset", str(data), "--output", str(tmp_path / "m.json")]
    assert main([*command, "--workers", "1", "--weighted_graph", str(graph)]) == 0
    if suffix == "graphml":
        read = networkx.read_graphml(graph)
    else:
        read = networkx.node_link_graph(json.loads(graph.read_text()), edges="edges")
    edge = read.edges["Emphysema", "F2"]
    assert (edge["relation"], edge["together"]) == ("association", 1)
    assert edge["pmi"] > 0
    assert main([*command, "--weighted_graph", str(tmp_path / "graph.txt")]) == 2


EXTRACTION = {
    "data": [{"diseases": ["congestive heart failure"], "features": ["Air bronchograms", "fog"]}]
    * 3,
    "disease_feature_map": {
        "Pulmonary Edema": [
            "air_bronchogram",
            "kerley lines",
            "attenuated vasculature",
            "fog",
            "cavity",
        ],
        "Gout": ["nodule"],
    },
}


def test_extraction_is_validated_and_merged() -> None:
    merged, done = merge_extraction(read_graph_json(), EXTRACTION)
    assert done["added"] == [["Edema", "D4", 3]]
    assert done["known"] == 1
    assert done["excluded"] == [["Edema", "F5", 0]]
    assert done["too_rare"] == [["Edema", "M8", 0]]
    assert done["unknown"] == ["fog", "Gout"]
    assert "D4" in merged["diseases"]["Edema"]["associations"]
    assert "D4" not in read_graph_json()["diseases"]["Edema"]["associations"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "needs a JSON object"),
        ({"data": []}, "disease_feature_map"),
        ({"data": [{"diseases": "x"}], "disease_feature_map": {}}, "case 1 needs"),
        ({"data": [], "disease_feature_map": {"Edema": 3}}, "features of Edema"),
    ],
)
def test_malformed_extraction_is_refused(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        merge_extraction(read_graph_json(), data)


def test_command_merges_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.json").write_text(json.dumps(EXTRACTION))
    output = tmp_path / "graph.json"
    assert main(["merge", "--input", str(tmp_path / "in.json"), "--output", str(output)]) == 0
    assert "1 associations added" in capsys.readouterr().out
    assert "D4" in load_graph(output).diseases["Edema"].associations
