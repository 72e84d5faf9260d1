"""Figures of a run."""

import math
import os
import tempfile
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from imdb_jax import plots
from imdb_jax.errors import UsageError

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


def epoch(number: int, *means: float, seeds: tuple[tuple[float, ...], ...] = ()) -> dict:
  """Return the line of an epoch with these METRICS; by default of one seed."""
  lines = [{"seed": seed, **dict(zip(METRICS, values, strict=True))} for seed, values in enumerate(seeds or (means,))]
  return {"epoch": number, **dict(zip(METRICS, means, strict=True)), "seeds": lines}


ONE = epoch(1, 0.5, 0.5, 0.5, 0.5)


def test_a_run_in_its_first_epoch(tmp_path):
  with pytest.raises(UsageError, match="run: no epoch has been finished yet"):
    plots.plot_history([], "run", tmp_path / "history.png")
  assert not (tmp_path / "history.png").exists()


def axes_of(history: list[dict], title: str = "run") -> list[Axes]:
  """Plot a history without drawing it, and return the axes of accuracy and loss."""
  figures = []
  with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
    patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plots.plot_history(history, title, Path(folder) / "history.png")
  figures[0].draw_without_rendering()
  return figures[0].axes


@pytest.mark.parametrize("num_epochs", [1, 2, 10, 100])
def test_epochs_are_counted_in_whole_numbers(num_epochs):
  for axes in axes_of([epoch(number, 0.5, 0.5, 0.5, 0.5) for number in range(1, num_epochs + 1)]):
    low, high = axes.get_xlim()
    ticks = [float(tick) for tick in axes.get_xticks() if low <= tick <= high]
    assert low < 1 <= num_epochs < high
    assert ticks
    assert all(tick.is_integer() for tick in ticks)


def test_the_range_of_the_seeds_is_visible_after_one_epoch():
  seeds = ((0.4, 0.3, 0.2, 0.1), (0.6, 0.7, 0.8, 0.9), (0.5, 0.5, 0.5, 0.5))
  accuracy, loss = axes_of([epoch(1, 0.5, 0.5, 0.5, 0.5, seeds=seeds)])
  for axes, ranges in ((loss, ((0.4, 0.6), (0.2, 0.8))), (accuracy, ((0.3, 0.7), (0.1, 0.9)))):
    lines = [
      segment.tolist()
      for each in axes.collections
      if isinstance(each, LineCollection)
      for segment in each.get_segments()
    ]
    assert lines == [[[1, low], [1, high]] for low, high in ranges]


def test_one_seed_has_no_range():
  for axes in axes_of([ONE]):
    assert not axes.collections
    assert "seeds" not in axes.figure.get_suptitle()


def test_the_best_value_is_written_beside_the_curve():
  history = [epoch(1, 0.6, 0.6, 0.5, 0.7), epoch(2, 0.4, 0.7, 0.2, 0.9), epoch(3, 0.3, 0.8, 0.6, 0.8)]
  accuracy, loss = axes_of(history)
  for axes, value, is_above in ((accuracy, 0.9, True), (loss, 0.2, False)):
    (label,) = axes.texts
    assert label.get_text() == f"{value:.4f}"
    _, y = axes.transData.transform((2, value))
    extent = label.get_window_extent()
    assert extent.y0 > y if is_above else extent.y1 < y


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, 5e-324])
def test_losses_of_a_run_that_nearly_diverges_are_plotted(value):
  """They are all that `store.metrics_log` accepts."""
  good, bad = (0.5, 0.5, 0.5, 0.5), (value, 0.5, value, 0.5)
  for history in ([epoch(1, *bad)], [ONE, epoch(2, *bad)], [epoch(1, *bad, seeds=(good, bad))]):
    axes_of(history)


@pytest.mark.parametrize("name", ["run-" * 60, "a $x_{ name$", "odd: \udcff\x1b\n\t"])
def test_any_name_of_a_run_fits_its_title(name):
  accuracy, _ = axes_of([ONE], name)
  figure = accuracy.figure
  assert figure.get_suptitle().startswith(name[:50].replace("\udcff\x1b\n\t", "    "))
  (title,) = figure.texts
  assert title.get_window_extent().x0 > 0


@pytest.mark.filterwarnings("error")
def test_a_name_that_the_font_lacks_gives_no_warning(tmp_path):
  plots.plot_history([ONE], "映画", tmp_path / "history.png")
  assert (tmp_path / "history.png").exists()


@pytest.mark.parametrize(
  ("name", "start"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_the_suffix_of_the_file_is_its_format(name, start, tmp_path):
  plots.plot_history([ONE], "run", tmp_path / name)
  assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_other_formats_are_refused(name, tmp_path):
  with pytest.raises(UsageError, match=f"{name}: its name must end in one of .png, .pdf, .svg"):
    plots.plot_history([ONE], "run", tmp_path / name)
  assert not (tmp_path / name).exists()


def test_what_is_in_the_way_is_replaced_and_not_written_through(tmp_path):
  outside, output = tmp_path / "outside", tmp_path / "history.png"
  outside.write_text("dear")
  # The second is left behind by a process that was killed.
  for link in (output, tmp_path / "history.png.new"):
    link.hardlink_to(outside)
    plots.plot_history([ONE], "run", output)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert outside.read_text() == "dear"
  output.unlink()
  os.mkfifo(output)
  # Opening the pipe would wait for its reader.
  plots.plot_history([ONE], "run", output)
  assert output.read_bytes().startswith(b"\x89PNG")


def test_a_link_is_not_followed(tmp_path):
  (tmp_path / "history.png").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(UsageError, match=r"history\.png: is a link"):
    plots.plot_history([ONE], "run", tmp_path / "history.png")
  assert not (tmp_path / "elsewhere").exists()
