"""Reports of runs as one page: `imdb-jax report`."""
