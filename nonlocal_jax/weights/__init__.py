"""Weights on disk: PyTorch files, the map between their names and ours, and Orbax checkpoints."""
