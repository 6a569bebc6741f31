"""`python -m nonlocal_jax` is the command `nonlocal-jax`."""

from nonlocal_jax.cli.main import main

if __name__ == '__main__':
  main()
