"""Tests: against mmsegmentation, PyTorch, NumPy in float64 and closed forms."""
