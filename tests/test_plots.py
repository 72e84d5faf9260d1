"""Figures from the files of a run."""

from pathlib import Path

import pytest

from imdb_jax import plots
from imdb_jax.errors import UsageError

COLUMNS = "epoch,loss,accuracy,val_loss,val_accuracy"


def run_with(run_dir: Path, *history: str) -> Path:
  """A folder of a run whose history.csv has these lines; without any there is none yet."""
  (run_dir / "config.json").touch()
  if history:
    (run_dir / "history.csv").write_text("\n".join(history) + "\n")
  return run_dir


@pytest.mark.parametrize("history", [(), (COLUMNS,)])
def test_a_run_in_its_first_epoch(history, tmp_path):
  with pytest.raises(UsageError, match="no epoch has been finished yet"):
    plots.plot_history(run_with(tmp_path, *history), tmp_path / "history.png")


def test_what_is_no_run(tmp_path):
  (tmp_path / "file").touch()
  for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
    with pytest.raises(UsageError, match=f"{path.name}: not the folder of a run"):
      plots.plot_history(path, tmp_path / "history.png")


@pytest.mark.parametrize(
  ("history", "told"),
  [
    (("epoch,loss", "1,0.5"), "has no column accuracy, val_accuracy, val_loss"),
    ((f"{COLUMNS},ensemble_accuracy", "1,0.5,0.5,0.5,0.5,0.5"), "has no column accuracy_min, accuracy_max, val_acc"),
    ((COLUMNS, "1,0.5,good,0.5,0.5"), "no readable history"),
    ((COLUMNS, "1,0.5"), "no readable history"),
    ((COLUMNS, "1,0.5,0.5,0.5,0.5,0.5"), "no readable history"),
    ((COLUMNS, f"1,{'0' * 2**18},0.5,0.5,0.5"), "no readable history"),
  ],
)
def test_a_damaged_history(history, told, tmp_path):
  with pytest.raises(UsageError, match=f"history.csv: {told}"):
    plots.plot_history(run_with(tmp_path, *history), tmp_path / "history.png")
