"""A page on this machine that segments images and shows where pixels look: `nonlocal-jax demo`."""
