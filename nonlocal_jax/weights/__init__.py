"""Weights on disk: released models, the map between names of arrays, and Orbax checkpoints."""
