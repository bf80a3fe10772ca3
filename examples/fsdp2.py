"""DPO of all weights under bare FSDP2, policy and reference sharded:

    torchrun --nproc_per_node 2 examples/fsdp2.py MODEL_FOLDER PAIRS.jsonl OUTPUT_FOLDER

The loss op needs the whole output head. FSDP2 gathers a module's weights while its forward runs,
so the loss is computed in the forward of the module that owns the head. Runs on the CPU (gloo);
untested on a GPU (nccl).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_fast import cpo_loss, from_padded


class Preference(nn.Module):
    """Policy and reference, whose forward is the mean DPO loss of a batch."""

    def __init__(self, policy: Any, reference: Any, beta: float) -> None:
        super().__init__()
        self.policy, self.reference = policy, reference.requires_grad_(False)
        self.beta = beta

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """ids, mask and labels [2B, T]: all chosen, then all rejected; not shifted."""
        hidden = self.policy.model(ids, mask)[0]
        with torch.no_grad():
            ref_hidden = self.reference.model(ids, mask)[0]
        out = cpo_loss(
            weight=self.policy.lm_head.weight,
            ref_weight=self.reference.lm_head.weight,
            beta=self.beta,
            **from_padded(hidden, labels, ref_hidden),
        )
        return out.loss


def shard(module: Preference, device: torch.device) -> Preference:
    """Shard each decoder layer separately, the rest (embeddings, norm, head) with the root."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for model in (module.policy, module.reference):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if device.type == "cpu":  # gloo supports only SUM
        for part in (*module.policy.model.layers, module):
            part.set_force_sum_reduction_for_comms(True)
    return module


def encode(tokenizer: Any, pairs: list[dict[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels [2B, T] of B pairs of text; only the answers are scored."""
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in pairs]
    eos = tokenizer.eos_token_id
    bos = [token for token in tokenizer("")["input_ids"] if token != eos]  # [] for many tokenizers
    prompts, answers = (
        tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for texts in zip(*sides, strict=True)
    )
    ids = [bos + head + tail + [eos] for head, tail in zip(prompts, answers, strict=True)]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, head in zip(labels, prompts, strict=True):
        row[: len(bos + head)] = -100
    return batch["input_ids"], batch["attention_mask"], labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="pairs per process and step")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    try:
        pairs = [json.loads(line) for line in args.pairs.read_text().splitlines()]
    except (OSError, ValueError) as error:
        parser.error(f"{args.pairs} is not a file of JSON lines: {error}")
    if not pairs or any(not {"prompt", "chosen", "rejected"} <= set(row) for row in pairs):
        parser.error(f"{args.pairs}: every line needs prompt, chosen and rejected")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc_per_node 2 examples/fsdp2.py ...")
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # never scored
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
        for _ in range(2)
    )
    module = shard(Preference(policy, reference, args.beta), device)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    step = args.batch * size
    for start in range(0, len(pairs) - step + 1, step):
        own = pairs[start + rank * args.batch :][: args.batch]
        loss = module(*(part.to(device) for part in encode(tokenizer, own)))
        loss.backward()  # FSDP2 averages the gradients over the processes
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"loss {mean.item() / size:.7f}", flush=True)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=whole)  # every process takes part
    if rank == 0:
        tokenizer.save_pretrained(args.output)
        policy.save_pretrained(args.output, state_dict=weights)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
