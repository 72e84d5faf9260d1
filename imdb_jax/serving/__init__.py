"""Predictions over HTTP. It needs starlette and uvicorn: `pip install 'imdb_jax[serve]'`."""
