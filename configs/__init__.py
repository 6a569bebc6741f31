"""One file a dataset and backbone, each a thin `get_config` over `nonlocal_jax.recipes`."""
