"""Reads and writes the files of `torch.save` without PyTorch; knows of no network."""
