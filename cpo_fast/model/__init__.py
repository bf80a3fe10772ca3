"""Tokenizer, images, checkpoints, LoRA, and the forward over a pack. Import single modules."""
