"""Non-local segmentation networks in JAX and Flax."""
