"""One file a dataset and backbone, each a thin `get_config` over `common.py`."""
