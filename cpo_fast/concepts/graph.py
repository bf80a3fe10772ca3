"""The concept graph: read from JSON, validated, and stored as a networkx graph.

The file lists 53 imaging attributes in four categories and 12 diseases with their hallmarks,
associations and exclusions (the relations of CPO, arXiv 2505.13081); all other pairs are
irrelevant. In a phrase, `...` matches up to five words of the same clause. `negated` lists normal
statements that deny an attribute without naming it. Exclusions in `same_region_exclusions`, and
contradictions of scope "region", hold within one hemithorax only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import networkx

from cpo_fast.errors import DataError
from cpo_fast.types import FINDINGS, Attribute, ConceptGraph, Disease

DEFAULT_GRAPH = Path(__file__).with_name("graph.json")
CATEGORIES = ("morphological", "density", "anatomical", "functional_dynamic")
COURSES = ("acute", "chronic", "either")
SCOPES = ("patient", "region")
_KNOWN_DISEASES = frozenset(FINDINGS) - {"No Finding"} | {"Emphysema"}
_MAX_BYTES = 32 << 20


def load_graph(path: str | Path | None = None) -> ConceptGraph:
    """Load the built-in concept graph, or the one in the JSON file `path`, and validate it.

    Raises DataError, which names the file, the entry and the remedy, for an unreadable or invalid
    file, missing keys, an unknown category, an undefined attribute or disease, a hallmark that is
    not an association, an attribute both associated and excluded, a contradiction of an attribute
    with itself or between hallmarks of one disease, an exclusion between diseases that is listed
    for one of them only or not supported by their attributes, and a cycle of such exclusions or of
    implications.
    """
    file = DEFAULT_GRAPH if path is None else Path(path)
    return graph_from_json(read_graph_json(file), str(file))


def read_graph_json(
    path: str | Path | None = None, what: str = "concept graph", limit: int = _MAX_BYTES
) -> Any:
    """Parse the built-in graph file or `path` (at most `limit` bytes), without validation. Raises
    DataError, which describes the file as `what`."""
    file = DEFAULT_GRAPH if path is None else Path(path)
    try:
        if file.stat().st_size > limit:
            raise DataError(
                f"{file}: {what}s of more than {limit >> 20} MiB are not read; is it the right "
                f"file?"
            )
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: the {what} can't be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: the {what} is not valid JSON ({error}).") from error


def graph_from_json(data: Any, file: str = "<memory>") -> ConceptGraph:
    """Build the graph from a parsed graph file. Raises DataError like `load_graph`."""
    check = _Checks(file)
    rows_of = check.mapping(data, "attributes", "the file")
    attributes = _read_attributes(rows_of, check)
    rows = check.mapping(data, "diseases", "the file")
    diseases = {name: _read_disease(name, row, attributes, check) for name, row in rows.items()}
    contradictions = _read_contradictions(
        check.sequence(data, "contradictions", "the file"), attributes, check
    )
    _check_hallmarks_agree(diseases, contradictions, check)
    excluded = _read_excluded(rows, diseases, check)
    implied = _read_implied(rows, check)

    network = networkx.Graph(name="cpo_fast concept graph")
    for key, node in attributes.items():
        network.add_node(
            key,
            kind="attribute",
            category=node.category,
            label=node.name,
            negated=check.strings(rows_of[key], "negated", f"attribute {key}", required=False),
        )
    for name, disease in diseases.items():
        row = rows[name]
        network.add_node(
            name,
            kind="disease",
            label=name,
            synonyms=check.strings(row, "synonyms", name, required=False),
            course=check.choice(row, "course", COURSES, name, default="either"),
            implies=implied[name],
            denied_with=check.known(row, "denied_with", rows, name),
        )
        for attribute in disease.associations:
            network.add_edge(
                name, attribute, relation="association", hallmark=attribute in disease.hallmarks
            )
        regional = check.strings(row, "same_region_exclusions", name, required=False)
        for attribute in set(regional) - set(disease.exclusions):
            check.fail(
                f'{name}: "same_region_exclusions" has {attribute}, which is not in "exclusions"; '
                "add it there."
            )
        for attribute in disease.exclusions:
            scope = "region" if attribute in regional else "patient"
            network.add_edge(name, attribute, relation="exclusion", scope=scope)
        for other in excluded[name]:
            network.add_edge(name, other, relation="exclusion", scope="patient")
    for pair, scope in contradictions.items():
        left, right = sorted(pair)
        network.add_edge(left, right, relation="contradiction", scope=scope)
    return ConceptGraph(attributes, diseases, frozenset(contradictions), excluded, network)


def compile_phrases(phrases: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches any of `phrases` (`...`: up to five words) in lower-case text."""
    parts = []
    for phrase in sorted(phrases, key=len, reverse=True):
        words = [
            re.escape(part.strip()).replace(r"\ ", r"[ ]") for part in phrase.lower().split("...")
        ]
        parts.append(r"(?:[ ][\w'-]+){0,5}?[ ]".join(words))
    return re.compile(r"\b(?:" + "|".join(parts) + r")\b")


def find_relation(graph: ConceptGraph, disease: str, attribute: str) -> str:
    """The relation of an attribute to a disease: "association", "exclusion" or "irrelevance"."""
    edge = graph.network.get_edge_data(disease, attribute)
    return "irrelevance" if edge is None else edge["relation"]


class _Checks:
    """Readers of parsed JSON whose errors name the file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def fail(self, message: str) -> NoReturn:
        raise DataError(f"{self.file}: {message}")

    def mapping(self, data: Any, key: str, where: str) -> Mapping[str, Any]:
        value = data.get(key) if isinstance(data, Mapping) else None
        if not isinstance(value, Mapping) or not value:
            self.fail(f'{where} needs "{key}", a JSON object that is not empty.')
        return value

    def sequence(self, data: Any, key: str, where: str) -> Sequence[Any]:
        value = data.get(key) if isinstance(data, Mapping) else None
        if not isinstance(value, list):
            self.fail(f'{where} needs "{key}", a JSON list.')
        return value

    def strings(self, data: Any, key: str, where: str, *, required: bool = True) -> tuple[str, ...]:
        value = data.get(key, None if required else []) if isinstance(data, Mapping) else None
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            self.fail(f'{where}: "{key}" must be a list of strings that are not empty.')
        return tuple(value)

    def known(self, data: Any, key: str, names: Mapping[str, Any], where: str) -> tuple[str, ...]:
        values = self.strings(data, key, where, required=False)
        for value in values:
            if value not in names:
                self.fail(f'{where}: "{key}" names the unknown disease "{value}".')
        return values

    def choice(
        self, data: Any, key: str, allowed: Sequence[str], where: str, *, default: str = ""
    ) -> str:
        value = data.get(key, default) if isinstance(data, Mapping) else None
        if value not in allowed:
            self.fail(f'{where}: {key} "{value}" is unknown; one of {", ".join(allowed)}.')
        return str(value)


def _read_attributes(rows: Mapping[str, Any], check: _Checks) -> dict[str, Attribute]:
    found = {}
    for key, row in rows.items():
        category = check.choice(row, "category", CATEGORIES, f"attribute {key}")
        name = row.get("name")
        if not isinstance(name, str) or not name:
            check.fail(f'attribute {key}: "name" is missing.')
        phrases = check.strings(row, "phrases", f"attribute {key}")
        synonyms = check.strings(row, "synonyms", f"attribute {key}", required=False)
        found[key] = Attribute(key, category, name, (*phrases, *synonyms))
    return found


def _read_disease(
    name: str, row: Any, attributes: Mapping[str, Attribute], check: _Checks
) -> Disease:
    if name not in _KNOWN_DISEASES:
        check.fail(f'disease "{name}" is none of {", ".join(sorted(_KNOWN_DISEASES))}.')
    kinds = {k: check.strings(row, k, name) for k in ("hallmarks", "associations", "exclusions")}
    for kind, ids in kinds.items():
        for key in ids:
            if key not in attributes:
                check.fail(f'{name}: "{kind}" names the undefined attribute {key}.')
    if not kinds["hallmarks"]:
        check.fail(f"{name}: needs at least one hallmark.")
    for key in kinds["hallmarks"]:
        if key not in kinds["associations"]:
            check.fail(f"{name}: the hallmark {key} is not among its associations; add it there.")
    for key in kinds["associations"]:
        if key in kinds["exclusions"]:
            check.fail(f"{name}: the attribute {key} is both associated and excluded; drop one.")
    return Disease(name, kinds["hallmarks"], kinds["associations"], kinds["exclusions"])


def _read_contradictions(
    rows: Sequence[Any], attributes: Mapping[str, Attribute], check: _Checks
) -> dict[frozenset[str], str]:
    found: dict[frozenset[str], str] = {}
    for number, row in enumerate(rows, start=1):
        where = f"contradiction {number}"
        pair = check.strings(row, "pair", where)
        if len(pair) != 2 or pair[0] == pair[1]:
            check.fail(f'{where}: "pair" must hold two different attributes.')
        for key in pair:
            if key not in attributes:
                check.fail(f"{where} names the undefined attribute {key}.")
        found[frozenset(pair)] = check.choice(row, "scope", SCOPES, where, default="region")
    return found


def _check_hallmarks_agree(
    diseases: Mapping[str, Disease], contradictions: Mapping[frozenset[str], str], check: _Checks
) -> None:
    for name, disease in diseases.items():
        for pair in contradictions:
            if pair <= set(disease.hallmarks):
                check.fail(
                    f"{name}: its hallmarks {' and '.join(sorted(pair))} contradict each other."
                )


def _read_excluded(
    rows: Mapping[str, Any], diseases: Mapping[str, Disease], check: _Checks
) -> dict[str, frozenset[str]]:
    """Disease -> diseases it excludes: listed for both, and supported by the hallmarks of both."""
    listed = {
        name: set(check.strings(rows[name], "excludes", name, required=False)) for name in diseases
    }
    one_sided = networkx.DiGraph()
    for name, others in listed.items():
        for other in others:
            if other not in diseases:
                check.fail(f'{name}: "excludes" names the unknown disease "{other}".')
            if other == name:
                check.fail(f'{name}: "excludes" names the disease itself.')
            if name not in listed[other]:
                one_sided.add_edge(name, other)
    try:
        cycle = [edge[0] for edge in networkx.find_cycle(one_sided)]
        check.fail(
            f"exclusions form a cycle: {' -> '.join([*cycle, cycle[0]])}; an exclusion holds "
            f"both ways, "
            f"so list each on both diseases or drop it."
        )
    except networkx.NetworkXNoCycle:
        pass
    for name, other in one_sided.edges:
        check.fail(
            f"{name} excludes {other}, but {other} does not exclude {name}; list it on both or "
            f"drop it."
        )
    for name, others in listed.items():
        for other in others:
            if not set(diseases[name].hallmarks) & set(diseases[other].exclusions):
                check.fail(
                    f"{name} and {other} exclude each other, but no hallmark of {name} is "
                    f"excluded by {other}."
                )
    return {name: frozenset(others) for name, others in listed.items()}


def _read_implied(rows: Mapping[str, Any], check: _Checks) -> dict[str, tuple[str, ...]]:
    implied = {name: check.known(row, "implies", rows, name) for name, row in rows.items()}
    arrows = networkx.DiGraph((name, other) for name, others in implied.items() for other in others)
    if not networkx.is_directed_acyclic_graph(arrows):
        check.fail("implications between diseases form a cycle; drop one of them.")
    return implied
