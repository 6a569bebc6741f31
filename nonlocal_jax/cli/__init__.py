"""The command `nonlocal-jax`, with one module per subcommand."""
