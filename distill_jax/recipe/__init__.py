"""The choices of `distill-jax distill`: models, data and sizes from what the user names."""
