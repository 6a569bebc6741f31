"""Training: loss, optimizer, training step, loop, checkpoints and log."""
