"""Figures of runs."""

import math
import os
import tempfile
from collections.abc import Callable
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


def axes_drawn_by(plot: Callable[..., None], *arguments) -> list[Axes]:
  """Plot without writing a file, and return the axes."""
  figures = []
  with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
    patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot(*arguments, Path(folder) / "figure.png")
  figures[0].draw_without_rendering()
  return figures[0].axes


def axes_of(history: list[dict], title: str = "run") -> list[Axes]:
  """Return the axes of accuracy and loss of a run."""
  return axes_drawn_by(plots.plot_history, history, title)


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


def test_models_are_points_of_their_training_time_and_accuracy():
  (axes,) = axes_drawn_by(plots.plot_accuracy_by_time, [("slow", 700.0, 0.85, 0.05), ("quick", 7.0, 0.91, 0.0)])
  assert axes.get_xscale() == "log"
  points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
  assert points == [[[7, pytest.approx(91)]], [[700, pytest.approx(85)]]]
  (bar,) = [segment.tolist() for each in axes.collections for segment in each.get_segments()]
  assert bar == [[700, pytest.approx(80)], [700, pytest.approx(90)]]


@pytest.mark.parametrize("size", [5, 40])
def test_the_legend_names_the_models_from_the_best_to_the_worst(size):
  (axes,) = axes_drawn_by(plots.plot_accuracy_by_time, [("b" * size, 1.0, 0.5, 0.0), ("a" * size, 2.0, 0.6, 0.0)])
  (legend,) = axes.figure.legends
  assert [text.get_text() for text in legend.get_texts()] == ["a" * size, "b" * size]
  assert axes.figure.bbox.containsx(legend.get_window_extent().x1)
  assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_learning_curves_have_the_mean_and_the_range_of_the_seeds():
  curves = {"lstm": [[0.5, 0.7, 0.8], [0.7, 0.9, 0.8]], "fast": [[0.9]]}
  lstm, fast = axes_drawn_by(plots.plot_learning_curves, curves)
  assert [lstm.get_title(), fast.get_title()] == ["lstm", "fast"]
  assert lstm.lines[-1].get_xydata().tolist() == [
    [1, pytest.approx(60)],
    [2, pytest.approx(80)],
    [3, pytest.approx(80)],
  ]
  assert fast.lines[-1].get_xydata().tolist() == [[1, 90]]
  bars = [segment.tolist() for segment in lstm.collections[0].get_segments()]
  assert bars == [
    [[1, pytest.approx(50)], [1, pytest.approx(70)]],
    [[2, pytest.approx(70)], [2, pytest.approx(90)]],
    [[3, pytest.approx(80)], [3, pytest.approx(80)]],
  ]
  assert lstm.get_ylim() == fast.get_ylim()


@pytest.mark.parametrize("num_models", [1, 4, 5, 9])
def test_each_model_has_its_own_curves(num_models):
  axes = axes_drawn_by(plots.plot_learning_curves, {f"model {number}": [[0.5, 0.6]] for number in range(num_models)})
  assert [each.get_title() for each in axes] == [f"model {number}" for number in range(num_models)]
