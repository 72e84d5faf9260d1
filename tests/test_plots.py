"""Figures from the files of a run."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from imdb_jax import plots
from imdb_jax.errors import UsageError

COLUMNS = "epoch,loss,accuracy,val_loss,val_accuracy"
RANGES = ",".join(f"{name}_{end}" for name in COLUMNS.split(",")[1:] for end in ("min", "max"))


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


@pytest.fixture
def axes_of(tmp_path, monkeypatch):
  """Draws a history instead of writing it, and gives the axes of accuracy and loss."""

  def draw(*history: str) -> list[Axes]:
    figures = []
    with monkeypatch.context() as patch:
      patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
      plots.plot_history(run_with(tmp_path, *history), tmp_path / "history.png")
    figures[0].draw_without_rendering()
    return figures[0].axes

  return draw


@pytest.mark.parametrize("num_epochs", [1, 2, 10, 100])
def test_epochs_are_counted_in_whole_numbers(num_epochs, axes_of):
  for axes in axes_of(COLUMNS, *(f"{epoch},0.5,0.5,0.5,0.5" for epoch in range(1, num_epochs + 1))):
    low, high = axes.get_xlim()
    ticks = [float(tick) for tick in axes.get_xticks() if low <= tick <= high]
    assert low < 1 <= num_epochs < high
    assert ticks
    assert all(tick.is_integer() for tick in ticks)


def test_the_range_of_the_seeds_is_seen_after_one_epoch(axes_of):
  ranges = "0.4,0.6,0.3,0.7,0.2,0.8,0.1,0.9"
  _, loss = axes_of(f"{COLUMNS},{RANGES},ensemble_accuracy", f"1,0.5,0.5,0.5,0.5,{ranges},0.5")
  lines = [
    segment.tolist() for each in loss.collections if isinstance(each, LineCollection) for segment in each.get_segments()
  ]
  assert lines == [[[1, 0.4], [1, 0.6]], [[1, 0.2], [1, 0.8]]]
