"""Devices, processes, compilation, signals, files and progress bars."""
