"""Check that a counterfactual asserts what its original asserts, clause by clause.

This module shares nothing with the generator or the labeller. A denied list holds only words known
to occur in denied lists ("focal", "large", "pleural", the findings themselves); any other word ends
it, unless "or" follows. An ambiguous clause therefore counts as asserted and must not become
denied.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from cpo_fast.concepts.graph import compile_phrases
from cpo_fast.types import ConceptGraph


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NAMES: dict[str, str] = {
    "adenopathy": "adenopathy lymphadenopathy",
    "airspace disease": "airspace-disease",
    "atelectasis": "atelectasis atelectases atelectatic",
    "blunting": "blunting blunted",
    "bronchiectasis": "bronchiectasis",
    "calcification": "calcification calcifications",
    "cardiomegaly": "cardiomegaly",
    "cavity": "cavity cavitary cavitation",
    "clips": "clips clip",
    "congestion": "congestion congested",
    "consolidation": "consolidation consolidations",
    "copd": "copd",
    "crowding": "crowding",
    "deformity": "deformity deformities",
    "degeneration": "degenerative spondylosis osteophyte osteophytes osteophytosis",
    "density": "density densities",
    "edema": "edema oedema",
    "effusion": "effusion effusions",
    "emphysema": "emphysema emphysematous",
    "enlargement": "enlarged enlargement",
    "eventration": "eventration",
    "fibrosis": "fibrosis fibrotic",
    "fracture": "fracture fractures fractured",
    "granuloma": "granuloma granulomas granulomata granulomatous",
    "hernia": "hernia hernias",
    "hyperinflation": "hyperinflation hyperinflated hyperexpanded hyperexpansion",
    "infiltrate": "infiltrate infiltrates infiltration",
    "kyphosis": "kyphosis",
    "lesion": "lesion lesions",
    "line": "catheter catheters picc",
    "mass": "mass masses",
    "metastasis": "metastasis metastases metastatic",
    "nodule": "nodule nodules nodular nodularity",
    "opacity": "opacity opacities opacification opacifications",
    "pacemaker": "pacemaker pacer aicd",
    "plaque": "plaque plaques",
    "pneumonia": "pneumonia pneumonias pneumonitis",
    "pneumothorax": "pneumothorax pneumothoraces hydropneumothorax",
    "scarring": "scar scars scarring",
    "scoliosis": "scoliosis dextroscoliosis levoscoliosis",
    "sternotomy": "sternotomy",
    "thickening": "thickening thickened",
    "tortuosity": "tortuous tortuosity ectatic ectasia",
    "tube": "tube tubes",
}
_KEY = {word: key for key, words in _NAMES.items() for word in words.split()}
_DISEASE: dict[str, frozenset[str]] = {
    "Atelectasis": frozenset({"atelectasis"}),
    "Cardiomegaly": frozenset({"cardiomegaly", "enlargement"}),
    "Consolidation": frozenset({"consolidation", "airspace disease"}),
    "Edema": frozenset({"edema", "congestion"}),
    "Emphysema": frozenset({"emphysema", "copd", "hyperinflation"}),
    "Lung Lesion": frozenset({"nodule", "mass", "lesion"}),
    "Lung Opacity": frozenset({"opacity", "airspace disease", "infiltrate", "density"}),
    "Pleural Effusion": frozenset({"effusion", "blunting"}),
    "Pleural Other": frozenset({"thickening", "plaque"}),
    "Pneumonia": frozenset({"pneumonia", "infiltrate", "airspace disease", "consolidation"}),
    "Pneumothorax": frozenset({"pneumothorax"}),
}
_TOKEN = re.compile(r"[a-z]+(?:['/-][a-z]+)*|[,;:(]")
_CLAUSE = re.compile(r"[,;:(]|\b(?:but|and)\b")
_ANY = re.compile("|".join(sorted({word[:5] for word in _KEY})) + r"|space")

_NEGATORS = frozenset({"no", "not", "without", "w/o", "nor", "neither", "never", "negative", "non"})
_GONE_BEFORE = frozenset({"resolution", "resolved", "cleared", "clearing", "clearance", "absence"})
_GONE_AFTER = frozenset(
    {"not", "resolved", "cleared", "none", "absent", "unlikely", "no", "negative", "gone"}
)
_CHANGES = _word_set(
    "change changes changed increase decrease worsening worsened improvement improved "
    "progression progressed regression resolution resolved clearing cleared reduction "
    "difference deterioration"
)
_COMPLEMENT = frozenset({"in", "of", "to", "for"})
_STOPS = frozenset({",", ";", ":", "(", "but", "and", "or", "nor", "with"})
_BREAKS = frozenset(
    {";", ":", "(", "but", "although", "though", "however", "while", "whereas", "which", "except",
     "besides", "causing", "status"}
)  # fmt: skip
_LISTED = _word_set(
    "acute active air airspace alveolar any abnormal apparent bony bone cardiac "
    "cardiopulmonary confluent convincing definite definitive dense discrete displaced "
    "dominant evidence evident focal for frank free gross hilar identifiable in infectious "
    "interstitial joint large lobar lung lymph measurable mediastinal new obvious occult of "
    "other osseous overt parenchymal patchy pericardial pleural pulmonary radiographic rib "
    "significant sizable sizeable soft space suspicious tissue vascular visible visualized "
    "xxxx suspicious-appearing sign signs also peripheral cavitary calcified noncalcified "
    "vertebral compression spinal pathologic bronchial underlying concerning developing "
    "superimposed cardiogenic destructive lytic sclerotic central venous associated recent "
    "evolving either"
)
"""Words that can precede a denied finding in a list without "or"."""
_OWN = _word_set(
    "unchanged stable persists persist persistent persisting remains remain increased "
    "decreased increasing decreasing improved improving worsened worsening has have had may "
    "might could represents represent again was were appears appear still terminates "
    "overlies shows demonstrates residual redemonstrated compatible consistent"
)
"""Words that make a clause a new assertion."""
_PLACED = frozenset({"left", "right", "bilaterally", "is", "are", "at", "the"})
"""Words that rarely follow a denied finding in such a list."""
_SIDES = {"left": "left", "right": "right", "bilateral": "both", "bibasilar": "both"}


@lru_cache(maxsize=1 << 17)
def list_findings(sentence: str) -> tuple[tuple[str, str, bool, int], ...]:
    """(finding, side or "", denied, index of its clause) for each finding named in a lower-case
    sentence."""
    if not _ANY.search(sentence):
        return ()
    words = _TOKEN.findall(sentence)
    heads = [_find_key(words, index) for index in range(len(words))]
    if not any(heads):
        return ()
    found: list[tuple[str, str, bool, int]] = []
    denied, clause, start = False, 0, 0
    for index, word in enumerate(words):
        if word in _STOPS:
            start = index + 1
            clause += word not in ("or", "nor", "with")
            if denied and word not in ("or", "nor"):
                denied = _list_continues(words, heads, index + 1)
        if word in _BREAKS or (word == "there" and words[index + 2 : index + 3] != ["no"]):
            denied = False
        if word in _NEGATORS or (
            word in ("free", "clear") and _next_word(words, index) in ("of", "from")
        ):
            denied = not _negates_change(words, index)
        elif word in _GONE_BEFORE and not denied and words[index - 1] not in _NEGATORS:
            denied = not any(heads[start:index])  # not "the effusion has resolved"
        key = heads[index]
        if key:
            side = next((_SIDES[w] for w in reversed(words[start:index]) if w in _SIDES), "")
            found.append((key, side, denied or _is_denied_after(words, index), clause))
    return tuple(found)


def _find_key(words: list[str], index: int) -> str:
    word = words[index]
    if word in ("disease", "process") and index and words[index - 1] in ("airspace", "space"):
        return "airspace disease"
    return _KEY.get(word, "")


def _next_word(words: list[str], index: int) -> str:
    return words[index + 1] if index + 1 < len(words) else ""


def _negates_change(words: list[str], index: int) -> bool:
    """Whether the negator at `index` negates a change ("no significant interval change in")."""
    for place in range(index + 1, min(index + 7, len(words))):
        word = words[place]
        if word in _STOPS or word in _KEY:
            return False
        if word in _CHANGES:
            following = _next_word(words, place)
            if words[index] == "not" or following in _COMPLEMENT:
                return True
            return word == "change" and following != "" and following not in _STOPS
    return False


def _list_continues(words: list[str], heads: list[str], start: int) -> bool:
    """Whether a denied list continues at `start`, after a comma, "and" or "with"."""
    stop = start
    while stop < len(words) and words[stop] not in _STOPS:
        stop += 1
    chunk = words[start:stop]
    if not chunk:
        return True
    if not _OWN.isdisjoint(chunk):
        return False
    last = max((i for i in range(start, stop) if heads[i]), default=-1)
    if last < 0:
        return True
    listed = all(
        word in _LISTED or heads[i] for i, word in enumerate(words[start : last + 1], start)
    )
    if listed and _PLACED.isdisjoint(words[last + 1 : stop]):
        return True
    return _is_closed_by_or(words, stop)


def _is_closed_by_or(words: list[str], stop: int) -> bool:
    for word in words[stop:]:
        if word in ("or", "nor", "and/or"):
            return True
        if word in _BREAKS or word == "with" or word in _OWN:
            return False
    return False


def _is_denied_after(words: list[str], index: int) -> bool:
    """Whether the finding at `index` is denied by the following words ("is not seen")."""
    for place in range(index + 1, min(index + 7, len(words))):
        word = words[place]
        if word in _STOPS and word != ":":
            return False
        if word in _GONE_AFTER:
            return not (word in _NEGATORS and _negates_change(words, place)) and (
                words[place - 1] != "not"
            )
    return False


def compare(
    graph: ConceptGraph, target: str, before: Iterable[str], after: Iterable[str]
) -> tuple[bool, bool]:
    """(all assertions kept, none denied): compare the lower-case sentences of the original
    (`before`) and of the counterfactual towards `target` (`after`)."""
    asserted, named, denied_before = _read_original(tuple(before))
    here: set[tuple[str, str]] = set()
    denied = Counter[str]()
    for line in after:
        for key, side, negative, _ in list_findings(line):
            if negative:
                denied[key] += 1
            else:
                here.update(((key, side), (key, "")))
    excluded = _excluded_keys(graph, target)
    lost: dict[tuple[str, str], bool] = {}
    for item, line in asserted:
        if item[:2] not in here and item[0] not in excluded:
            tied = _is_tied(graph, target, line, item[3], excluded)
            lost[item[:2]] = lost.get(item[:2], True) and tied
    kept = all(number <= denied_before[key] for key, number in denied.items() if key in named)
    return all(lost.values()), kept


@lru_cache(maxsize=1 << 12)
def _read_original(
    lines: tuple[str, ...],
) -> tuple[tuple[tuple[tuple[str, str, bool, int], str], ...], frozenset[str], Counter[str]]:
    """(asserted findings with their sentences, their names, number of denials per finding) of an
    original."""
    items = [(item, line) for line in lines for item in list_findings(line)]
    asserted = tuple((item, line) for item, line in items if not item[2])
    denied = Counter(item[0] for item, _ in items if item[2])
    return asserted, frozenset(item[0] for item, _ in asserted), denied


@lru_cache(maxsize=64)
def _excluded_keys(graph: ConceptGraph, target: str) -> frozenset[str]:
    names = graph.excluded[target]
    return frozenset[str]().union(*(_DISEASE.get(name, frozenset()) for name in names))


def _is_tied(
    graph: ConceptGraph, target: str, line: str, clause: int, excluded: frozenset[str]
) -> bool:
    """Whether a clause names a finding together with one that the target excludes."""
    if any(key in excluded and place == clause for key, _, _, place in list_findings(line)):
        return True
    pattern = _exclusion_pattern(graph, target)
    return pattern is not None and pattern.search(_CLAUSE.split(line)[clause]) is not None


@lru_cache(maxsize=64)
def _exclusion_pattern(graph: ConceptGraph, target: str) -> re.Pattern[str] | None:
    names = [p for a in graph.diseases[target].exclusions for p in graph.attributes[a].phrases]
    return compile_phrases(sorted(names)) if names else None


_EXCEPTING = re.compile(
    r"\b(?:except|excepting|exception of|apart from|aside from|other than|besides)\b(?P<tail>.*)"
)
_FREE = re.compile(
    r"(?<!heart )(?<!um )(?<!es )(?<!tte )(?<!urs )(?<!ur )(?<!is )(?<!are )"
    r"\botherwise,? (?:\w+ly )?(?:clear|unremarkable|normal|negative)(?: exam\w*| study)?\W*$|"
    r"\blungs?\b.*\bclear\b(?! (?:of|from))|\bclear lungs?\b|"
    r"\blungs?\b.*\b(?:normal|unremarkable)\b|"
    r"\b(?:normal|negative) (?:chest|study|exam\w*|radiograph\w*)\b|\bchest is normal\b"
)


@lru_cache(maxsize=1 << 15)
def exempts_other(sentence: str, target: str) -> bool:
    """Whether a lower-case sentence calls the lungs clear except for a finding other than
    `target`, a disease of the lungs."""
    if not _FREE.search(sentence):
        return False
    match = _EXCEPTING.search(sentence)
    part = match["tail"].split(",")[0] if match else sentence.partition(" otherwise")[0]
    named = [key for key, _, denied, _ in list_findings(part) if not denied]
    return bool(match or ("otherwise" in sentence and named)) and _DISEASE[target].isdisjoint(named)
