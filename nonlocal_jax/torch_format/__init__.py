"""Reads and writes files of `torch.save` without PyTorch; independent of any network."""
