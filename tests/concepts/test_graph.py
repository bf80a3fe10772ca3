"""The default concept graph is consistent; an inconsistent graph is refused with its fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.concepts import load_graph
from cpo_fast.concepts.__main__ import count_graph, main
from cpo_fast.concepts.graph import CATEGORIES, DEFAULT_GRAPH, compile_phrases, find_relation
from cpo_fast.errors import DataError


def read_default_graph() -> dict[str, Any]:
    return json.loads(DEFAULT_GRAPH.read_text())


def write_graph(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "graph.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_default_graph_has_the_size_in_the_paper() -> None:
    graph = load_graph()
    assert (len(graph.diseases), len(graph.attributes)) == (12, 53)
    assert {a.category for a in graph.attributes.values()} == set(CATEGORIES)
    assert set(graph.network.nodes) == set(graph.diseases) | set(graph.attributes)
    assert all(a.phrases for a in graph.attributes.values())


def test_only_emphysema_and_atelectasis_exclude_each_other() -> None:
    excluded = load_graph().excluded
    assert excluded["Emphysema"] == {"Atelectasis"}
    assert excluded["Atelectasis"] == {"Emphysema"}
    assert not any(
        others for name, others in excluded.items() if name not in ("Emphysema", "Atelectasis")
    )


def test_stable_appearance_excludes_no_disease() -> None:
    graph = load_graph()
    assert all("F10" not in disease.exclusions for disease in graph.diseases.values())


def test_every_pair_has_one_relation() -> None:
    graph = load_graph()
    for name, disease in graph.diseases.items():
        for key in graph.attributes:
            expected = (
                "association"
                if key in disease.associations
                else "exclusion"
                if key in disease.exclusions
                else "irrelevance"
            )
            assert find_relation(graph, name, key) == expected


def test_phrase_patterns_match_every_phrase() -> None:
    for attribute in load_graph().attributes.values():
        pattern = compile_phrases(attribute.phrases)
        for phrase in attribute.phrases:
            assert pattern.search(phrase.lower().replace(" ... ", " two words ")), phrase


def test_a_gap_in_a_phrase_spans_at_most_five_words() -> None:
    pattern = compile_phrases(["heart ... enlarged"])
    assert pattern.search("the heart is mildly enlarged")
    assert pattern.search("heart a b c d e enlarged")
    assert not pattern.search("heart a b c d e f enlarged")
    assert not pattern.search("the heart is normal. the liver is enlarged")


def _set(path: str, value: Any) -> Any:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            data = data[int(key)] if isinstance(data, list) else data[key]
        if isinstance(data, list):
            data[int(last)] = value
        else:
            data[last] = value

    return change


def _exclude(pairs: dict[str, list[str]]) -> Any:
    def change(data: dict[str, Any]) -> None:
        for row in data["diseases"].values():
            row["excludes"] = []
        for name, others in pairs.items():
            data["diseases"][name]["excludes"] = others

    return change


BROKEN = {
    "undefined attribute": (
        _set("diseases/Edema/associations", ["D7", "F4", "X9"]),
        r'Edema: "associations" names the undefined attribute X9',
    ),
    "hallmark not associated": (
        _set("diseases/Edema/hallmarks", ["M13"]),
        "Edema: the hallmark M13 is not among its associations",
    ),
    "no hallmark": (
        _set("diseases/Edema/hallmarks", []),
        "Edema: needs at least one hallmark",
    ),
    "associated and excluded": (
        _set("diseases/Edema/exclusions", ["F4"]),
        "Edema: the attribute F4 is both associated and excluded",
    ),
    "unknown category": (
        _set("attributes/M1/category", "colour"),
        'attribute M1: category "colour" is unknown',
    ),
    "no phrases": (
        _set("attributes/M1/phrases", "lobar"),
        '"phrases" must be a list of strings',
    ),
    "no name": (_set("attributes/M1/name", ""), 'attribute M1: "name" is missing'),
    "contradiction with itself": (
        _set("contradictions/0", {"pair": ["F1", "F1"], "scope": "patient"}),
        "two different attributes",
    ),
    "contradiction undefined": (
        _set("contradictions/0", {"pair": ["F1", "F99"], "scope": "patient"}),
        "undefined attribute F99",
    ),
    "contradiction scope": (
        _set("contradictions/0", {"pair": ["F1", "F2"], "scope": "house"}),
        'scope "house" is unknown',
    ),
    "hallmarks contradict": (
        _set("contradictions/0", {"pair": ["D7", "F4"], "scope": "patient"}),
        "Edema: its hallmarks D7 and F4 contradict each other",
    ),
    "one-sided exclusion": (
        _exclude({"Emphysema": ["Atelectasis"]}),
        "Emphysema excludes Atelectasis, but Atelectasis does not exclude Emphysema",
    ),
    "cycle of exclusions": (
        _exclude({"Edema": ["Pneumonia"], "Pneumonia": ["Emphysema"], "Emphysema": ["Edema"]}),
        r"exclusions form a cycle: .* -> .* -> .* -> ",
    ),
    "exclusion without anatomy": (
        _exclude({"Edema": ["Pneumonia"], "Pneumonia": ["Edema"]}),
        "no hallmark of .* is excluded by",
    ),
    "excludes itself": (_exclude({"Edema": ["Edema"]}), "names the disease itself"),
    "excludes unknown": (_exclude({"Edema": ["Gout"]}), 'unknown disease "Gout"'),
    "implication cycle": (
        _set("diseases/Lung Opacity/implies", ["Pneumonia"]),
        "form a cycle",
    ),
    "implies unknown": (_set("diseases/Edema/implies", ["Gout"]), 'unknown disease "Gout"'),
    "regional but not excluded": (
        _set("diseases/Edema/same_region_exclusions", ["M1"]),
        'which is not in "exclusions"',
    ),
    "no diseases": (_set("diseases", {}), 'needs "diseases"'),
    "attributes of another type": (_set("attributes", []), 'needs "attributes"'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inconsistent_graph_is_refused(case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    data = read_default_graph()
    change(data)
    path = write_graph(tmp_path, data)
    with pytest.raises(DataError, match=message) as caught:
        load_graph(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "[1]", "null", '{"attributes": 3}', "[" * 100_000])
def test_file_without_a_graph_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"graph\.json"):
        load_graph(write_graph(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        load_graph(tmp_path / "nowhere.json")


def test_an_unknown_disease_is_refused(tmp_path: Path) -> None:
    data = read_default_graph()
    data["diseases"]["Gout"] = data["diseases"]["Edema"]
    with pytest.raises(DataError, match='disease "Gout" is none of'):
        load_graph(write_graph(tmp_path, data))


def test_statistics_count_the_relations(capsys: pytest.CaptureFixture[str]) -> None:
    graph = load_graph()
    assert main(["stats"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts == count_graph(graph)
    associations = sum(len(d.associations) for d in graph.diseases.values())
    assert counts["relations"]["association"] == associations
    assert counts["relations"]["contradiction"] == len(graph.contradictions)


def test_export_reads_back(tmp_path: Path) -> None:
    import networkx

    for name in ("graph.json", "graph.graphml"):
        assert main(["export", "--output", str(tmp_path / name)]) == 0
    there = networkx.read_graphml(tmp_path / "graph.graphml")
    network = load_graph().network
    assert set(there.nodes) == set(network.nodes)
    assert there.number_of_edges() == network.number_of_edges()
    back = networkx.node_link_graph(
        json.loads((tmp_path / "graph.json").read_text()), edges="edges"
    )
    assert set(back.edges) == set(network.edges)
    assert main(["export", "--output", str(tmp_path / "graph.txt")]) == 2


def test_plot_writes_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    path = tmp_path / "graph.png"
    assert main(["plot", "--output", str(path)]) == 0
    with Image.open(path) as image:
        assert min(image.size) > 500
    assert main(["plot", "--output", str(tmp_path / "graph.nonsense")]) == 2
    assert "graph.nonsense" in capsys.readouterr().err
