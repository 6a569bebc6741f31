"""The commands, one file each; `main.py` and `scripts/` are their faces."""
