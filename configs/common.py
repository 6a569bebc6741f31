"""Re-exports `nonlocal_jax.recipes` for existing configs that import this module."""

from nonlocal_jax.recipes import BATCH_SIZES, base_config, published_config

__all__ = ['BATCH_SIZES', 'base_config', 'published_config']
