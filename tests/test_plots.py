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

  def draw(*history: str, run: str = "") -> list[Axes]:
    figures = []
    with monkeypatch.context() as patch:
      patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
      plots.plot_history(run_with(tmp_path / run, *history), tmp_path / "history.png")
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


def test_the_best_value_is_written_where_the_curve_is_not(axes_of):
  accuracy, loss = axes_of(COLUMNS, "1,0.6,0.6,0.5,0.7", "2,0.4,0.7,0.2,0.9", "3,0.3,0.8,0.6,0.8")
  for axes, value, is_above in ((accuracy, 0.9, True), (loss, 0.2, False)):
    (label,) = axes.texts
    assert label.get_text() == f"{value:.4f}"
    _, y = axes.transData.transform((2, value))
    extent = label.get_window_extent()
    assert extent.y0 > y if is_above else extent.y1 < y


@pytest.mark.parametrize("name", ["run-" * 60, "a $x_{ name$"])
def test_any_name_of_a_run_fits_its_title(name, tmp_path, axes_of):
  (tmp_path / name).mkdir()
  accuracy, _ = axes_of(COLUMNS, "1,0.5,0.5,0.5,0.5", run=name)
  figure = accuracy.figure
  assert figure.get_suptitle().startswith(name[:50])
  (title,) = figure.texts
  assert title.get_window_extent().x0 > 0


@pytest.mark.parametrize(
  ("name", "start"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_the_name_of_the_file_tells_its_format(name, start, tmp_path):
  plots.plot_history(run_with(tmp_path, COLUMNS, "1,0.5,0.5,0.5,0.5"), tmp_path / name)
  assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_another_format_is_refused(name, tmp_path):
  with pytest.raises(UsageError, match=f"{name}: its name should end in one of .png, .pdf, .svg"):
    plots.plot_history(run_with(tmp_path, COLUMNS, "1,0.5,0.5,0.5,0.5"), tmp_path / name)
  assert not (tmp_path / name).exists()
