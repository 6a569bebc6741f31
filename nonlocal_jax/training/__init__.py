"""Training: loss, optimizer, state and loop."""
