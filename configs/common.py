"""For configs that import this module; the recipes themselves are in `nonlocal_jax.recipes`."""

from nonlocal_jax.recipes import BATCH_SIZES, base_config, published_config, variant_name

__all__ = ['BATCH_SIZES', 'base_config', 'published_config', 'variant_name']
