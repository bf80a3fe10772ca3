"""Merge an LLM's extraction, in the format of the CPO paper, into a graph file.

The extraction is `{"data": [{"diseases": [...], "features": [...]}, ...], "disease_feature_map":
{disease: [features]}}`. A feature matches an attribute if it contains one of its phrases, a disease
matches by name or synonym. Names without a match are reported.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cpo_fast.concepts.graph import compile_phrases, graph_from_json
from cpo_fast.errors import DataError
from cpo_fast.types import Disease

MIN_CASES = 3
"""Minimum number of cases with both disease and feature to accept a map entry."""


def merge_extraction(
    graph_json: Mapping[str, Any], extraction: Any, file: str = "<extraction>"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(graph file with new associations, summary of the merge).

    A map entry becomes an association unless the graph already has or excludes it, or fewer than
    `MIN_CASES` cases support it. Raises DataError for another format of the extraction.
    """
    cases, entries = _check_extraction(extraction, file)
    graph = graph_from_json(graph_json)
    nodes = graph.network.nodes
    diseases = {
        name: compile_phrases([name.lower(), *nodes[name]["synonyms"]]) for name in graph.diseases
    }
    attributes = {key: compile_phrases([a.name, *a.phrases]) for key, a in graph.attributes.items()}
    support: Counter[tuple[str, str]] = Counter()
    for case in cases:
        named = {n for text in case["diseases"] for n in _find_matches(text, diseases)}
        seen = {k for text in case["features"] for k in _find_matches(text, attributes)}
        support.update((name, key) for name in named for key in seen)

    merged = copy.deepcopy(dict(graph_json))
    done: dict[str, Any] = {"added": [], "known": 0, "too_rare": [], "excluded": [], "unknown": []}
    for disease, features in entries.items():
        names = _find_matches(disease, diseases)
        if not names:
            done["unknown"].append(disease)
        for text in features if names else ():
            keys = _find_matches(text, attributes)
            if not keys:
                done["unknown"].append(text)
            for name in names:
                for key in keys:
                    _add_association(merged, graph.diseases[name], key, support[name, key], done)
    graph_from_json(merged, file)  # the merged graph must be valid
    return merged, done


def _add_association(
    merged: dict[str, Any], disease: Disease, key: str, cases: int, done: dict[str, Any]
) -> None:
    row = [disease.name, key, cases]
    listed = merged["diseases"][disease.name]["associations"]
    if key in listed:
        done["known"] += 1
    elif key in disease.exclusions:
        done["excluded"].append(row)
    elif cases < MIN_CASES:
        done["too_rare"].append(row)
    else:
        listed.append(key)
        done["added"].append(row)


def _find_matches(text: str, patterns: Mapping[str, Any]) -> list[str]:
    lower = text.lower().replace("_", " ")
    return [key for key, pattern in patterns.items() if pattern.search(lower)]


def _check_extraction(
    data: Any, file: str
) -> tuple[list[dict[str, list[str]]], dict[str, list[str]]]:
    def strings(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    if not isinstance(data, Mapping):
        raise DataError(f'{file}: needs a JSON object with "data" and "disease_feature_map"')
    cases, entries = data.get("data"), data.get("disease_feature_map")
    if not isinstance(cases, list) or not isinstance(entries, Mapping):
        raise DataError(f'{file}: needs "data", a list, and "disease_feature_map", an object')
    for number, case in enumerate(cases, start=1):
        if not isinstance(case, Mapping) or not all(
            strings(case.get(key)) for key in ("diseases", "features")
        ):
            raise DataError(
                f'{file}: case {number} needs "diseases" and "features", lists of strings'
            )
    for name, features in entries.items():
        if not strings(features):
            raise DataError(f"{file}: the features of {name} must be a list of strings")
    return list(cases), dict(entries)
