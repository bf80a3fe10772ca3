"""Training: arguments, feed of packed batches, objectives, the loop, checkpoints, metrics."""
