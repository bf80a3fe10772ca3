"""English grammar of edited sentences: lists, grammatical number, verb agreement."""

from __future__ import annotations

import re

from cpo_fast.counterfactual.graph.text import capitalise

_PLURAL = re.compile(r"(?:(?<!s)s|ae|ces|ses|\bxxxx)$")
_SINGULAR_S = re.compile(
    r"(?:pneumothorax|process|focus|disease|silhouette|atelectasis|status|metastasis|emphysema)$"
)


def join_items(items: list[str], word: str, oxford: bool) -> str:
    """Join `items` with commas and `word`, preceded by a comma if `oxford`: "A, B, or C"."""
    if len(items) == 1:
        return items[0]
    if not word:
        return ", ".join(items)
    if len(items) == 2:
        return f"{items[0]} {word} {items[1]}"
    return ", ".join(items[:-1]) + (", " if oxford else " ") + f"{word} {items[-1]}"


def is_plural(noun: str) -> bool:
    """Whether the head of a noun phrase is plural."""
    last = noun.lower().split()[-1] if noun.split() else ""
    head = re.split(r" (?:of|in|to|at|within|on) ", noun.lower())[0].split()
    last = head[-1] if head else last
    return bool(_PLURAL.search(last)) and not _SINGULAR_S.search(last)


def agree_there(head: str, noun: str) -> str:
    """Make "there is no" or "there are no" in `head` agree with the following `noun`."""
    if re.search(r"\b(?:evidence|suggestion|areas?|signs?|findings?)\b", head.lower()):
        return head
    wanted = "are" if is_plural(noun) else "is"
    return re.sub(r"(?i)(there )(?:is|are)\b", lambda m: m.group(1) + wanted, head, count=1)


def agree_tail(tail: str, items: list[str]) -> str:
    """Make "is seen" or "are seen" in `tail` agree with the last of the preceding `items`."""
    wanted = "are" if is_plural(items[-1]) else "is"
    return re.sub(r"^(,?\s+)(?:is|are)\b", lambda m: m.group(1) + wanted, tail, count=1)


def agree(tail: str, several: bool) -> str:
    """Make the first verb of `tail` plural if `several`, else singular."""
    forms = {
        "is": "are", "was": "were", "appears": "appear", "remains": "remain", "has": "have",
    }  # fmt: skip
    if not several:
        forms = {is_plural: single for single, is_plural in forms.items()}
    match = re.match(r"(\s+)(\w+)\b", tail)
    if match is None or match.group(2).lower() not in forms:
        return tail
    return match.group(1) + forms[match.group(2).lower()] + tail[match.end() :]


def capitalise_like(clause: str, text: str) -> str:
    """Capitalise `text` if `clause` starts with a capital."""
    return capitalise(text) if clause[:1].isupper() else text
