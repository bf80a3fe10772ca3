"""trl's DPO with LoRA, scored by cpo_fast: python examples/trl_dpo.py MODEL PAIRS.jsonl OUTPUT"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig

from cpo_fast.integrations.trl import CPODPOTrainer  # in place of trl.DPOTrainer

if len(sys.argv) != 4:
    print("usage: python examples/trl_dpo.py MODEL PAIRS.jsonl OUTPUT", file=sys.stderr)
    sys.exit(2)
model, pairs, output_dir = sys.argv[1:]
trainer = CPODPOTrainer(
    model=model,
    args=DPOConfig(output_dir=output_dir, max_steps=5, logging_steps=1, bf16=False,
                   gradient_checkpointing=False, report_to="none"),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"),
)  # fmt: skip
trainer.train()
trainer.save_model()
