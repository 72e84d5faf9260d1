"""Files of a run: run directory, checkpoints and their manifests, atomic writes and bounded reads."""
