"""DPO of all weights in a plain loop: python examples/plain_loop.py MODEL_FOLDER PAIRS.jsonl

PAIRS.jsonl has lines {"prompt", "chosen", "rejected"} of text, two for each step."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_fast import cpo_loss

folder, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
pairs = [json.loads(line) for line in Path(file).read_text().splitlines()]

for start in range(0, len(pairs), 2):
    batch = pairs[start : start + 2]  # in the model: all chosen, then all rejected
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in batch]
    heads = [tokenizer(prompt)["input_ids"] for prompt, _ in sides]
    tails = [tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] for _, answer in sides]
    ids = {"input_ids": [head + tail for head, tail in zip(heads, tails, strict=True)]}
    inputs = tokenizer.pad(ids, return_tensors="pt", padding_side="right")  # [rows, T]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, head in zip(labels, heads, strict=True):
        row[: len(head)] = -100  # the prompt is not scored
    hidden, ref_hidden = (m.model(**inputs)[0][:, :-1].flatten(0, 1) for m in (model, reference))
    rows = torch.arange(len(sides))
    segments = rows[:, None].expand_as(labels[:, 1:]).flatten()  # a sequence per row
    out = cpo_loss(hidden, model.lm_head.weight, labels[:, 1:].flatten(), segments,
                   torch.stack(rows.chunk(2), 1), ref_hidden=ref_hidden,
                   ref_weight=reference.lm_head.weight, beta=0.1)  # fmt: skip
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {out.loss.item():.7f}")
