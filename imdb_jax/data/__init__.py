"""Reviews and token arrays. Nothing in this folder imports JAX."""
