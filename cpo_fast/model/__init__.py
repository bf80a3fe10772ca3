"""Tokenizer, images, checkpoints, LoRA, and the forward over a pack. Import the module you need."""
