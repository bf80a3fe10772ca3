"""DPO of all weights in a plain loop: python examples/plain_loop.py MODEL_FOLDER PAIRS.jsonl

PAIRS.jsonl has lines {"prompt", "chosen", "rejected"} of text, two for each step."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_fast import cpo_loss, from_padded

if len(sys.argv) != 3:
    print("usage: python examples/plain_loop.py MODEL_FOLDER PAIRS.jsonl", file=sys.stderr)
    sys.exit(2)
folder, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding is not scored
eos = tokenizer.eos_token_id
bos = [token for token in tokenizer("")["input_ids"] if token != eos]  # [] for many tokenizers
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
pairs = [json.loads(line) for line in Path(file).read_text().splitlines()]

for start in range(0, len(pairs), 2):
    batch = pairs[start : start + 2]  # in the model: all chosen, then all rejected
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in batch]
    prompts, answers = (tokenizer(list(texts), add_special_tokens=False)["input_ids"]
                        for texts in zip(*sides, strict=True))  # fmt: skip
    ids = [bos + head + tail + [eos] for head, tail in zip(prompts, answers, strict=True)]
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, head in zip(labels, prompts, strict=True):
        row[: len(bos + head)] = -100  # the prompt is not scored
    hidden, ref_hidden = (m.model(**inputs).last_hidden_state for m in (model, reference))
    out = cpo_loss(weight=model.lm_head.weight, ref_weight=reference.lm_head.weight, beta=0.1,
                   **from_padded(hidden, labels, ref_hidden))  # fmt: skip
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {out.loss.item():.7f}")
