"""Training: settings, feed of packed batches, objectives, loop, checkpoints, metrics."""
