"""The `local` generator: a causal language model in a folder, run by transformers' generate.

Batches are padded on the left and decoded greedily. Retries, and all drafts at a temperature above
0, are sampled with one random generator per record, so that a record does not depend on the other
records of its batch (up to rounding in batched matrix products).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.counterfactual.prompt import Task, build_prompt, parse_rewrite
from cpo_fast.counterfactual.writers import (
    Draft,
    GaveUpError,
    check_minimums,
    choose_sampling,
)
from cpo_fast.data.positions import position_limit
from cpo_fast.errors import RecordError, UsageError
from cpo_fast.types import ConceptGraph

if TYPE_CHECKING:
    import torch


class LocalWriter:
    """Generates with `model` and `tokenizer`, `batch_size` records at a time; see `load_local`.

    `on_token` is called with (new tokens per draft so far, `max_new_tokens`) at every token of a
    batch.
    """

    name = "local"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        temperature: float = 0.0,
        max_new_tokens: int = 1024,
        on_token: Callable[[int, int], None] | None = None,
    ) -> None:
        check_minimums(
            ("batch_size", batch_size, 1),
            ("temperature", temperature, 0),
            ("max_new_tokens", max_new_tokens, 1),
        )
        if tokenizer.eos_token_id is None:
            raise UsageError("--model: its tokenizer has no end-of-text token; give another model")
        self._model, self._tokenizer = model, tokenizer
        self._temperature, self._max_new = temperature, max_new_tokens
        self._on_token = on_token
        self.window = batch_size
        self.faults: Counter[str] = Counter()

    def write(self, graph: ConceptGraph, tasks: Sequence[Task]) -> Iterator[tuple[int, Draft]]:
        limit = position_limit(self._model.config)
        prompts: dict[int, list[int]] = {}
        for index, task in enumerate(tasks):
            ids = self._encode(build_prompt(graph, task))
            if limit is not None and len(ids) + self._max_new > limit:
                detail = f"{len(ids)} and {self._max_new} new tokens, at most {limit} together"
                self.faults["prompt-too-long"] += 1
                yield index, GaveUpError("prompt-too-long", detail)
            else:
                prompts[index] = ids
        if prompts:
            written = self._generate(list(prompts.values()), [tasks[i] for i in prompts])
            for index, new in zip(prompts, written, strict=True):
                yield index, self._draft(new, tasks[index])

    def _draft(self, new: list[int], task: Task) -> Draft:
        try:
            return parse_rewrite(self._text(new), task.report)
        except RecordError as error:
            self.faults[error.reason] += 1
            return error

    def _encode(self, prompt: str) -> list[int]:
        if self._tokenizer.chat_template:
            prompt = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            return list(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return list(self._tokenizer(prompt + "\n\n")["input_ids"])

    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return {*listed, self._tokenizer.eos_token_id}

    def _generate(self, prompts: list[list[int]], tasks: list[Task]) -> list[list[int]]:
        """New token ids for each prompt, including padding."""
        import torch
        from transformers import LogitsProcessorList

        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        width = max(map(len, prompts))
        device = self._model.device
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # [B, T]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        processors = LogitsProcessorList([_Sampling(tasks, self._temperature)])
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self._max_new,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(self._ends()),
                pad_token_id=pad,
                logits_processor=processors,
                streamer=_Streamer(self._on_token, self._max_new) if self._on_token else None,
            )
        return [row[width:].tolist() for row in out]

    def _text(self, new: list[int]) -> str:
        ends = self._ends()
        stop = next((i for i, token in enumerate(new) if token in ends), None)
        if stop is None and len(new) >= self._max_new:
            raise RecordError("answer-cut-short", f"no end within {self._max_new} tokens")
        return str(self._tokenizer.decode(new[:stop], skip_special_tokens=True))


class _Streamer:
    """Receives tokens from `generate`: first the prompts, then one token per row at a time."""

    def __init__(self, on_token: Callable[[int, int], None], most: int) -> None:
        self.on_token, self.most, self.tokens = on_token, most, -1

    def put(self, _: Any) -> None:
        self.tokens += 1
        self.on_token(self.tokens, self.most)

    def end(self) -> None:
        pass


class _Sampling:
    """Turns greedy decoding into sampling with one generator per row: the argmax of logits /
    temperature + Gumbel noise is a sample from the softmax."""

    def __init__(self, tasks: Sequence[Task], temperature: float) -> None:
        import torch

        self._rows: list[tuple[float, torch.Generator]] = []
        for task in tasks:
            value, seed = choose_sampling(task, temperature)
            self._rows.append((value, torch.Generator().manual_seed(seed >> 1)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        scores = scores.float()  # [B, V]
        for row, (temperature, random) in enumerate(self._rows):
            if temperature > 0:
                noise = torch.empty(scores.shape[1]).exponential_(generator=random).log_()
                scores[row] = scores[row] / temperature - noise.to(scores.device)
        return scores


def load_local(folder: str | Path, **options: Any) -> LocalWriter:
    """Load the causal LM and tokenizer of a folder, on the GPU if available; `options` go to
    `LocalWriter`.

    Weights are read from safetensors only, and no code of the folder is run. Raises UsageError for
    a folder without such a model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"--model {folder}: not a folder with a config.json; give a model folder")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **common)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", use_safetensors=True, **common
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"--model {folder}: no causal language model in safetensors with a tokenizer "
            f"({type(error).__name__})"
        ) from error
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return LocalWriter(model, tokenizer, **options)
