"""One row of a preference file -> Preference, for each supported format.

A parser takes the fields of the row, the root of image paths, and an id for rows without one. It
raises RecordError as `preference_values`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cpo_fast.data.preference_build import (
    Row,
    assemble_preference,
    no_rejected,
    read_number,
    refuse_marked,
    row_images,
)
from cpo_fast.data.preference_reports import parse_ccf, parse_counterfactual
from cpo_fast.data.preference_values import (
    Message,
    add_images,
    add_system,
    count_placeholders,
    image_refs,
    list_of,
    object_of,
    read_answer,
    read_message,
    read_messages,
    refuse_unlearned,
    split_tags,
    template_options,
    text_of,
)
from cpo_fast.errors import RecordError
from cpo_fast.types import IMAGE_TOKEN, Preference

PAIR = ("chosen", "rejected")
_NECTAR_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _shared_start(chosen: list[Any], rejected: list[Any]) -> int:
    """Number of leading messages or characters common to two answers; as in trl, the last one of
    the shorter answer is not counted."""
    last = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(last) if chosen[n] != rejected[n]), max(last, 0))


def _split_implicit(chosen: Any, rejected: Any) -> tuple[list[Message], Any, Any]:
    """Prompt and answers from two conversations, or texts, with a common start."""
    if chosen is not None and chosen == rejected:
        raise RecordError("chosen-equals-rejected", "the two conversations are the same")
    if isinstance(chosen, list) and isinstance(rejected, list):
        cut = _shared_start(chosen, rejected)
        return read_messages(chosen[:cut], "chosen"), chosen[cut:], rejected[cut:]
    chosen, rejected = text_of(chosen, "chosen"), text_of(rejected, "rejected")
    cut = _shared_start(list(chosen), list(rejected))
    if cut and chosen[cut] != rejected[cut] and chosen[cut - 1] == " ":
        cut -= 1  # as in trl, the space belongs to the answers
    return read_messages(chosen[:cut], "chosen") if cut else [], chosen[cut:], rejected[cut:]


def parse_trl(row: Row, root: str, id: str) -> Preference:
    """trl, and this project's rows, which can have `rejected_responses` instead of `rejected`, and
    `rejected_images` or `rejected_prompt` as other inputs of the rejected answers.

    Without a prompt, or with a text prompt beside conversations, the prompt is implicit: the common
    start of both answers. Images without a placeholder precede the first user message. If prompt
    and answers are all strings, they are plain text without a chat template; with images only if
    the prompt contains the model's own placeholder for each.
    A row of trl's SFTTrainer has `completion` instead of the two answers; a row of this project can
    have an empty `rejected_responses`. Both are answers without a pair. A `system` beside the
    prompt becomes its first message, and the row is then a conversation.
    `ref_chosen_logps` and `ref_rejected_logps` are not used: the reference is the run's own model.
    """
    alone = None
    if row.get("chosen") is None and row.get("rejected") is None:
        alone = row.get("completion")
    chosen = row.get("chosen") if alone is None else alone
    several = row.get("rejected_responses")
    given = row.get("prompt")
    conversation = isinstance(chosen, list) and isinstance(given, str)
    rejected: list[Any]
    if several is not None:
        prompt, rejected = read_messages(given, "prompt"), list_of(several, "rejected_responses")
    elif alone is not None:
        prompt, rejected = read_messages(given, "prompt"), []
    elif given is None or conversation:
        prompt, chosen, other = _split_implicit(chosen, row.get("rejected"))
        rejected = [other]
        if not conversation and isinstance(chosen, str) and row.get("system"):
            raise RecordError("unread-field", "system cannot precede text without a prompt")
        if conversation:
            prompt = prompt or read_messages(given, "prompt")
    else:
        prompt, rejected = read_messages(given, "prompt"), [row.get("rejected")]
    name = "rejected" if several is None else "rejected_responses"
    answers = [read_answer(one, name) for one in rejected]
    said = prompt[0]["content"] if prompt and not isinstance(given, list) else None
    asked, prompt = prompt, add_system(row, prompt)
    images = row_images(row, root)
    own = row.get("rejected_images")
    own_images = image_refs(own, root, "rejected_images") if own else None
    own_prompt = None
    if (other_prompt := row.get("rejected_prompt")) is not None:
        turns = add_system(row, read_messages(other_prompt, "rejected_prompt"))
        count = len(images if own_images is None else own_images)
        own_prompt = add_images(turns, count, insert=not count_placeholders(turns))
    plain = (
        isinstance(said, str)
        and own_prompt is None
        and len(asked) == len(prompt)
        and all(isinstance(one, str) for one in (chosen, *rejected))
    )
    if plain and images:
        plain = IMAGE_TOKEN in str(said)
        if plain and str(said).count(IMAGE_TOKEN) != len(images):
            raise RecordError("image-placeholder-mismatch", "the text has too few or many")
    return assemble_preference(
        row,
        id,
        tuple(prompt)
        if plain
        else add_images(prompt, len(images), insert=not count_placeholders(prompt)),
        read_answer(chosen, "chosen"),
        answers,
        images,
        own_images,
        own_prompt,
        plain=plain,
        template=template_options(row),
        sighted=row.get("images") == [],
    )


def parse_swift(row: Row, root: str, id: str) -> Preference:
    """ms-swift: the last of `messages` is the chosen answer, `<image>` tags mark the images.

    If `rejected_messages` start differently, or `rejected_response` is several messages, the
    rejected answer has its own prompt: the last answer of each conversation is scored. A row
    without these fields has no rejected answer.
    """
    turns = read_messages(row.get("messages"), "messages")
    if not turns or turns[-1]["role"] != "assistant":
        raise RecordError("not-one-answer", "messages should end with the assistant's answer")
    chosen = read_answer([turns[-1]], "messages")
    refuse_unlearned(row["messages"][-1:], "messages")
    images = row_images(row, root)
    own = row.get("rejected_images")
    own_images = image_refs(own, root, "rejected_images") if own else None
    rejected, own_prompt, others = chosen, None, None
    if (given := row.get("rejected_response")) is not None:
        if isinstance(given, list):
            asked = max((n for n, t in enumerate(turns, 1) if t["role"] != "assistant"), default=0)
            others = [*turns[:asked], *read_messages(given, "rejected_response")]
        else:
            rejected = read_answer(given, "rejected_response")
    elif (given := row.get("rejected_messages")) is not None:
        others = read_messages(given, "rejected_messages")
    elif own_images is None and any(name.startswith("rejected_") for name in row):
        raise no_rejected()
    if others is not None:
        rejected = read_answer(others[-1:], "rejected_messages")
        if others[:-1] != turns[:-1]:
            count = len(images if own_images is None else own_images)
            others = split_tags(add_system(row, others[:-1]))
            own_prompt = add_images(others, count, insert=True)
    return assemble_preference(
        row,
        id,
        add_images(split_tags(add_system(row, turns[:-1])), len(images), insert=True),
        chosen,
        (rejected,) if any(name.startswith("rejected_") for name in row) else (),
        images,
        own_images,
        own_prompt,
    )


def parse_llama_factory(row: Row, root: str, id: str) -> Preference:
    """LLaMA-Factory's sharegpt rows: `conversations` end with a human message; with `kto_tag`
    instead of `chosen` and `rejected`, with the marked answer."""
    turns = [
        read_message(turn, "conversations", "from", "value")
        for turn in list_of(row.get("conversations"), "conversations")
    ]
    answers = [read_message(row[name], name, "from", "value") for name in PAIR if name in row]
    if "kto_tag" in row and not answers and turns and turns[-1]["role"] == "assistant":
        answers = [turns.pop()]
    elif len(answers) < len(PAIR):
        raise RecordError("missing-field", "there should be chosen and rejected")
    if not turns or turns[-1]["role"] != "user":
        raise RecordError("not-one-answer", "conversations should end with a human message")
    turns = add_system(row, turns)
    chosen, *rejected = (
        read_answer([answer], name) for answer, name in zip(answers, PAIR, strict=False)
    )
    images = row_images(row, root)
    prompt = add_images(split_tags(turns), len(images), insert=False)
    return assemble_preference(row, id, prompt, chosen, rejected, images)


def parse_alpaca(row: Row, root: str, id: str) -> Preference:
    """A named question, rendered with the chat template: Alpaca's `instruction` + `input` (joined
    by a line break, as in LLaMA-Factory and ms-swift), `question` (Orca), or `query`.

    `system` and `history` (pairs of question and answer) come first. Answers are `chosen` and
    `rejected`, `response` and `rejected_response`, or a single answer: `response`, `output`.
    Conversations as answers contain the question: such a row is read as trl's.
    """
    if isinstance(row.get("chosen"), list):
        return parse_trl(row, root, id)
    alpaca = (text_of(row.get(name) or "", name) for name in ("instruction", "input"))
    asked = {"\n".join(text for text in alpaca if text.strip())}
    asked |= {text_of(row.get(name) or "", name) for name in ("question", "query")}
    asked = {text for text in asked if text.strip()}
    if len(asked) > 1:
        raise RecordError("unclear-question", "instruction, question and query differ")
    turns: list[Message] = []
    for turn in list_of(row.get("history") or [], "history"):
        said = list_of(turn, "history")
        if len(said) != 2:
            raise RecordError("wrong-type", "history should hold pairs of question and answer")
        turns += [
            {"role": role, "content": text_of(text, "history")}
            for role, text in zip(("user", "assistant"), said, strict=True)
        ]
    turns += [{"role": "user", "content": text} for text in asked]
    if not asked:
        raise RecordError("empty-prompt", "instruction, input, question and query are empty")
    pairs = (("chosen", "rejected"), ("response", "rejected_response"), ("output", ""))
    good, bad = next((pair for pair in pairs if row.get(pair[0]) is not None), pairs[0])
    if row.get(bad) is None and any(name in row for name in ("rejected", "rejected_response")):
        raise no_rejected()
    images = row_images(row, root)
    prompt = split_tags(add_system(row, turns))
    return assemble_preference(
        row,
        id,
        add_images(prompt, len(images), insert=not count_placeholders(prompt)),
        read_answer(row.get(good), good),
        () if row.get(bad) is None else (read_answer(row[bad], bad),),
        images,
    )


def _nectar_prompt(text: str) -> list[Message]:
    """The turns of a text marked "Human:" and "Assistant:"; one user turn without marks."""
    _, *turns = _NECTAR_TURN.split(text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    said: list[Message] = [
        {"role": speakers[who], "content": what.strip()}
        for who, what in zip(turns[::2], turns[1::2], strict=True)
        if what.strip()
    ]
    return said or [{"role": "user", "content": text}]


def parse_ranked(row: Row, root: str, id: str) -> Preference:
    """Ranked answers, best = lowest rank: NeMo-RL's `completions` or Nectar's `answers`.

    The best is chosen, all with a worse rank are rejected, in order; ties with the best are
    dropped.
    """
    field, name = ("completions", "completion") if "completions" in row else ("answers", "answer")
    listed = []
    for entry in list_of(row.get(field), field):
        rank = read_number(object_of(entry, field).get("rank"))
        if rank is None or rank < 0:
            raise RecordError("bad-rank", f"{field} has a rank that is not a number >= 0")
        listed.append((rank, read_answer(entry.get(name), field), entry))
    if not listed:
        raise RecordError("empty-response", f"{field} is empty")
    listed.sort(key=lambda pair: pair[0])
    best, chosen, entry = listed[0]
    refuse_marked(entry, paired=False)
    if listed[-1][0] == best:
        raise no_rejected()
    if "context" in row:
        prompt = read_messages(row["context"], "context")
    else:
        prompt = _nectar_prompt(text_of(row.get("prompt"), "prompt"))
    images = row_images(row, root)
    prompt = add_system(row, prompt)
    return assemble_preference(
        row,
        id,
        add_images(prompt, len(images), insert=not count_placeholders(prompt)),
        chosen,
        [text for rank, text, _ in listed if rank > best],
        images,
    )


PARSERS: dict[str, Callable[[Row, str, str], Preference]] = {
    "trl": parse_trl,
    "ms-swift": parse_swift,
    "llama-factory": parse_llama_factory,
    "alpaca": parse_alpaca,
    "ranked": parse_ranked,
    "ccf": parse_ccf,
    "preferences": parse_trl,
    "counterfactuals": parse_counterfactual,
}
"""Format name -> parser; "preferences" and "counterfactuals" are this project's formats."""


def detect_format(row: Row) -> str | None:
    """The format by the field names of `row`, or None."""
    names = row.keys()
    if {"counterfactual", "target", "report"} <= names:
        return "counterfactuals"
    if {"counterfact", "report"} <= names:
        return "ccf"
    if {"context", "completions"} <= names or {"prompt", "answers"} <= names:
        return "ranked"
    if "conversations" in names and ({"chosen", "rejected"} <= names or "kto_tag" in names):
        return "llama-factory"
    pair = {"chosen", "rejected"} <= names
    if "messages" in names and not pair:
        return "ms-swift"
    if {"chosen", "rejected_responses"} <= names:
        return "preferences"
    if "prompt" not in names and names & {"instruction", "input", "question", "query"}:
        conversations = pair and isinstance(row["chosen"], list)
        if not conversations and (pair or names & {"response", "output"}):
            return "alpaca"
    return "trl" if pair or {"prompt", "completion"} <= names else None
