"""One row of a preference file -> Preference, for each format that its users already have.

A parser takes the row's fields, the folder that image paths are relative to, and the id that the
row gets when it brings none. It raises RecordError as `preference_values` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cpo_fast.data.preference_build import (
    Row,
    build,
    no_rejected,
    number,
    refuse_marked,
    row_images,
)
from cpo_fast.data.preference_reports import parse_ccf, parse_counterfactual
from cpo_fast.data.preference_values import (
    Message,
    image_refs,
    list_of,
    message_of,
    messages,
    object_of,
    placeholders,
    refuse_unlearned,
    response,
    tags_to_parts,
    template_options,
    text_of,
    with_images,
    with_system,
)
from cpo_fast.errors import RecordError
from cpo_fast.types import IMAGE_TOKEN, Preference

PAIR = ("chosen", "rejected")
_NECTAR_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _shared_start(chosen: list[Any], rejected: list[Any]) -> int:
    """How many messages, or characters, two answers have in common at their start; as in trl the
    shorter one keeps its last."""
    last = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(last) if chosen[n] != rejected[n]), max(last, 0))


def _implicit(chosen: Any, rejected: Any) -> tuple[list[Message], Any, Any]:
    """Prompt and answers out of two conversations, or texts, that share their start."""
    if chosen is not None and chosen == rejected:
        raise RecordError("chosen-equals-rejected", "the two conversations are the same")
    if isinstance(chosen, list) and isinstance(rejected, list):
        cut = _shared_start(chosen, rejected)
        return messages(chosen[:cut], "chosen"), chosen[cut:], rejected[cut:]
    chosen, rejected = text_of(chosen, "chosen"), text_of(rejected, "rejected")
    cut = _shared_start(list(chosen), list(rejected))
    if cut and chosen[cut] != rejected[cut] and chosen[cut - 1] == " ":
        cut -= 1  # as trl does: the space belongs to the answers
    return messages(chosen[:cut], "chosen") if cut else [], chosen[cut:], rejected[cut:]


def parse_trl(row: Row, root: str, id: str) -> Preference:
    """trl, and our own rows, which may hold `rejected_responses` in place of `rejected`, and
    `rejected_images` or `rejected_prompt` for what the rejected answers were given instead.

    The prompt is implicit (what both answers share) when there is none or when it is text and the
    answers are conversations. Images without a placeholder stand before what the first user says.
    Where prompt and answers are all strings they are plain text, without a chat template; with
    images they are so only if the prompt holds the model's own placeholder for each.
    A row of trl's SFTTrainer has `completion` in place of the two answers, one of ours no
    `rejected_responses` in its list: an answer to learn, without a pair. A `system` beside the
    prompt stands in front of it, and then the row is a conversation.
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
        prompt, rejected = messages(given, "prompt"), list_of(several, "rejected_responses")
    elif alone is not None:
        prompt, rejected = messages(given, "prompt"), []
    elif given is None or conversation:
        prompt, chosen, other = _implicit(chosen, row.get("rejected"))
        rejected = [other]
        if not conversation and isinstance(chosen, str) and row.get("system"):
            raise RecordError("unread-field", "system has no place before text without a prompt")
        if conversation:
            prompt = prompt or messages(given, "prompt")
    else:
        prompt, rejected = messages(given, "prompt"), [row.get("rejected")]
    name = "rejected" if several is None else "rejected_responses"
    answers = [response(one, name) for one in rejected]
    said = prompt[0]["content"] if prompt and not isinstance(given, list) else None
    asked, prompt = prompt, with_system(row, prompt)
    images = row_images(row, root)
    own = row.get("rejected_images")
    own_images = image_refs(own, root, "rejected_images") if own else None
    own_prompt = None
    if (other_prompt := row.get("rejected_prompt")) is not None:
        turns = with_system(row, messages(other_prompt, "rejected_prompt"))
        count = len(images if own_images is None else own_images)
        own_prompt = with_images(turns, count, insert=not placeholders(turns))
    plain = (
        isinstance(said, str)
        and own_prompt is None
        and len(asked) == len(prompt)
        and all(isinstance(one, str) for one in (chosen, *rejected))
    )
    if plain and images:
        plain = IMAGE_TOKEN in str(said)
        if plain and str(said).count(IMAGE_TOKEN) != len(images):
            raise RecordError("image-placeholder-mismatch", "the text has another number of images")
    return build(
        row,
        id,
        tuple(prompt)
        if plain
        else with_images(prompt, len(images), insert=not placeholders(prompt)),
        response(chosen, "chosen"),
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

    `rejected_messages` that begin otherwise, and a `rejected_response` of several messages, give
    the rejected answer a prompt of its own: of each conversation the last answer is scored. A row
    without any field for it has no rejected answer.
    """
    turns = messages(row.get("messages"), "messages")
    if not turns or turns[-1]["role"] != "assistant":
        raise RecordError("not-one-answer", "messages should end with the assistant's answer")
    chosen = response([turns[-1]], "messages")
    refuse_unlearned(row["messages"][-1:], "messages")
    images = row_images(row, root)
    own = row.get("rejected_images")
    own_images = image_refs(own, root, "rejected_images") if own else None
    rejected, own_prompt, others = chosen, None, None
    if (given := row.get("rejected_response")) is not None:
        if isinstance(given, list):
            asked = max((n for n, t in enumerate(turns, 1) if t["role"] != "assistant"), default=0)
            others = [*turns[:asked], *messages(given, "rejected_response")]
        else:
            rejected = response(given, "rejected_response")
    elif (given := row.get("rejected_messages")) is not None:
        others = messages(given, "rejected_messages")
    elif own_images is None and any(name.startswith("rejected_") for name in row):
        raise no_rejected()
    if others is not None:
        rejected = response(others[-1:], "rejected_messages")
        if others[:-1] != turns[:-1]:
            count = len(images if own_images is None else own_images)
            others = tags_to_parts(with_system(row, others[:-1]))
            own_prompt = with_images(others, count, insert=True)
    return build(
        row,
        id,
        with_images(tags_to_parts(with_system(row, turns[:-1])), len(images), insert=True),
        chosen,
        (rejected,) if any(name.startswith("rejected_") for name in row) else (),
        images,
        own_images,
        own_prompt,
    )


def parse_llama_factory(row: Row, root: str, id: str) -> Preference:
    """LLaMA-Factory's sharegpt rows: `conversations` end with what a human says; with `kto_tag` in
    place of `chosen` and `rejected`, with the answer that it marks."""
    turns = [
        message_of(turn, "conversations", "from", "value")
        for turn in list_of(row.get("conversations"), "conversations")
    ]
    answers = [message_of(row[name], name, "from", "value") for name in PAIR if name in row]
    if "kto_tag" in row and not answers and turns and turns[-1]["role"] == "assistant":
        answers = [turns.pop()]
    elif len(answers) < len(PAIR):
        raise RecordError("missing-field", "there should be chosen and rejected")
    if not turns or turns[-1]["role"] != "user":
        raise RecordError("not-one-answer", "conversations should end with what a human says")
    turns = with_system(row, turns)
    chosen, *rejected = (
        response([answer], name) for answer, name in zip(answers, PAIR, strict=False)
    )
    images = row_images(row, root)
    prompt = with_images(tags_to_parts(turns), len(images), insert=False)
    return build(row, id, prompt, chosen, rejected, images)


def parse_alpaca(row: Row, root: str, id: str) -> Preference:
    """A question by name, asked through the chat template: Alpaca's `instruction` + `input` (one
    text of two lines, as LLaMA-Factory and ms-swift join them), `question` (Orca), or `query`.

    `system` and `history` (pairs of question and answer) stand in front. Answers are `chosen` and
    `rejected`, `response` and `rejected_response`, or one answer alone: `response`, `output`.
    Conversations as answers hold the question themselves: the row is one of trl.
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
    prompt = tags_to_parts(with_system(row, turns))
    return build(
        row,
        id,
        with_images(prompt, len(images), insert=not placeholders(prompt)),
        response(row.get(good), good),
        () if row.get(bad) is None else (response(row[bad], bad),),
        images,
    )


def _nectar_prompt(text: str) -> list[Message]:
    """Turns of a text marked "Human:" and "Assistant:"; one of the user where nothing is marked."""
    _, *turns = _NECTAR_TURN.split(text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    said: list[Message] = [
        {"role": speakers[who], "content": what.strip()}
        for who, what in zip(turns[::2], turns[1::2], strict=True)
        if what.strip()
    ]
    return said or [{"role": "user", "content": text}]


def parse_ranked(row: Row, root: str, id: str) -> Preference:
    """Ranked answers, the lowest rank best: NeMo-RL's `completions` or Nectar's `answers`.

    The best one is chosen, all that rank worse are rejected, in order; those that tie with it are
    left out.
    """
    field, name = ("completions", "completion") if "completions" in row else ("answers", "answer")
    listed = []
    for entry in list_of(row.get(field), field):
        rank = number(object_of(entry, field).get("rank"))
        if rank is None or rank < 0:
            raise RecordError("bad-rank", f"{field} has a rank that is not a number from 0 up")
        listed.append((rank, response(entry.get(name), field), entry))
    if not listed:
        raise RecordError("empty-response", f"{field} is empty")
    listed.sort(key=lambda pair: pair[0])
    best, chosen, entry = listed[0]
    refuse_marked(entry, paired=False)
    if listed[-1][0] == best:
        raise no_rejected()
    if "context" in row:
        prompt = messages(row["context"], "context")
    else:
        prompt = _nectar_prompt(text_of(row.get("prompt"), "prompt"))
    images = row_images(row, root)
    prompt = with_system(row, prompt)
    return build(
        row,
        id,
        with_images(prompt, len(images), insert=not placeholders(prompt)),
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
"""Format name -> parser; "preferences" and "counterfactuals" are what this project writes."""


def tell(row: Row) -> str | None:
    """The format that the fields of `row` tell, or None."""
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
