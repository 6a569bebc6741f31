"""Devices, compilation, signals, files and progress bars."""
