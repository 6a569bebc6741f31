"""Devices, compilation, signals, files and progress: what programs run on."""
