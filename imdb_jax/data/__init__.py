"""Reviews to token arrays. Nothing in this folder imports jax."""
