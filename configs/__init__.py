"""One config file per dataset and backbone, each a `get_config` over `nonlocal_jax.recipes`."""
