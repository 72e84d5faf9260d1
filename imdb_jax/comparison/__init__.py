"""Models compared on the same reviews: `imdb-jax compare`."""
