"""Figures of runs."""

import math
import os
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imdb_jax import plots
from imdb_jax.errors import UsageError

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


def epoch(number: int, *means: float, seeds: tuple[tuple[float, ...], ...] = ()) -> dict:
  """Return the line of an epoch with these METRICS; by default of one seed."""
  lines = [{"seed": seed, **dict(zip(METRICS, values, strict=True))} for seed, values in enumerate(seeds or (means,))]
  return {"epoch": number, **dict(zip(METRICS, means, strict=True)), "seeds": lines}


ONE = epoch(1, 0.5, 0.5, 0.5, 0.5)


def test_a_run_in_its_first_epoch():
  with pytest.raises(UsageError, match="run: no epoch has been finished yet"):
    plots.history([], "run")


def draw(figure: Figure) -> list[Axes]:
  """Draw a figure without writing a file, and return its axes."""
  figure.draw_without_rendering()
  return figure.axes


def axes_of(history: list[dict], title: str = "run", **options) -> list[Axes]:
  """Return the axes of accuracy and loss of a run."""
  return draw(plots.history(history, title, **options))


@pytest.mark.parametrize("num_epochs", [1, 2, 10, 100])
def test_epochs_are_counted_in_whole_numbers(num_epochs):
  for axes in axes_of([epoch(number, 0.5, 0.5, 0.5, 0.5) for number in range(1, num_epochs + 1)]):
    low, high = axes.get_xlim()
    ticks = [float(tick) for tick in axes.get_xticks() if low <= tick <= high]
    assert low < 1 <= num_epochs < high
    assert ticks
    assert all(tick.is_integer() for tick in ticks)


def points(axes: Axes) -> list[list]:
  """Return the points of each line."""
  return [line.get_xydata().tolist() for line in axes.lines]


def test_seeds_are_thin_and_their_ensemble_is_bold():
  seeds = ((0.4, 0.3, 0.2, 0.1), (0.6, 0.7, 0.8, 0.9))
  accuracy, loss = axes_of([epoch(1, 0.5, 0.5, 0.5, 0.55, seeds=seeds), epoch(2, 0.5, 0.5, 0.5, 0.65, seeds=seeds)])
  assert points(accuracy)[:3] == [[[1, 0.3], [2, 0.3]], [[1, 0.7], [2, 0.7]], [[1, 0.5], [2, 0.5]]]
  assert points(accuracy)[3:6] == [[[1, 0.1], [2, 0.1]], [[1, 0.9], [2, 0.9]], [[1, 0.55], [2, 0.65]]]
  assert points(loss)[5] == [[1, 0.5], [2, 0.5]]
  one, other, ensemble = (line.get_linewidth() for line in accuracy.lines[3:6])
  assert one == other < ensemble / 2


def test_the_seeds_of_a_single_epoch_are_visible():
  seeds = ((0.4, 0.3, 0.2, 0.1), (0.6, 0.7, 0.8, 0.9))
  accuracy, _ = axes_of([epoch(1, 0.5, 0.5, 0.5, 0.5, seeds=seeds)])
  assert all(line.get_marker() not in ("", "None") for line in accuracy.lines)


def test_one_seed_has_one_line_each_and_a_mark_at_the_best():
  for axes in axes_of([ONE]):
    assert points(axes) == [[[1, 0.5]]] * 3


def test_the_article_is_dotted_over_its_own_epochs():
  reference = {"accuracy": [0.1, 0.2, 0.3], "val_accuracy": [0.4, 0.5, 0.6]}
  accuracy, loss = axes_of([ONE], validation="test", reference=reference)
  assert points(accuracy)[1] == [[1, 0.1], [2, 0.2], [3, 0.3]]
  labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
  assert labels == ["training", "article, training", "test", "article, test"]
  assert len(loss.lines) == 3


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
  plots.save(plots.history([ONE], "映画"), tmp_path / "history.png")
  assert (tmp_path / "history.png").exists()


@pytest.mark.parametrize(
  ("name", "start"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_the_suffix_of_the_file_is_its_format(name, start, tmp_path):
  plots.save(plots.history([ONE], "run"), tmp_path / name)
  assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_other_formats_are_refused(name, tmp_path):
  with pytest.raises(UsageError, match=f"{name}: its name must end in one of .png, .pdf, .svg"):
    plots.save(plots.history([ONE], "run"), tmp_path / name)
  assert not (tmp_path / name).exists()


def test_what_is_in_the_way_is_replaced_and_not_written_through(tmp_path):
  outside, output = tmp_path / "outside", tmp_path / "history.png"
  outside.write_text("dear")
  # The second is left behind by a process that was killed.
  for link in (output, tmp_path / "history.png.new"):
    link.hardlink_to(outside)
    plots.save(plots.history([ONE], "run"), output)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert outside.read_text() == "dear"
  output.unlink()
  os.mkfifo(output)
  # Opening the pipe would wait for its reader.
  plots.save(plots.history([ONE], "run"), output)
  assert output.read_bytes().startswith(b"\x89PNG")


def test_a_link_is_not_followed(tmp_path):
  (tmp_path / "history.png").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(UsageError, match=r"history\.png: is a link"):
    plots.save(plots.history([ONE], "run"), tmp_path / "history.png")
  assert not (tmp_path / "elsewhere").exists()


def test_an_element_of_a_page_has_no_fixed_colour_and_no_names_of_its_own():
  """A name that occurs twice in a page would be ambiguous."""
  text = plots.svg(plots.history([ONE], "run"))
  assert text.startswith("<svg")
  assert "var(--accent, #2563a8)" in text
  assert not re.findall("(?<!, )#(?:1d1d1b|6b6b66|e3e3dd|2563a8|b8561f)", text)
  names = {*re.findall('id="([^"]*)"', text)}
  assert not {"figure_1", "axes_1"} & names
  assert {*re.findall(r"url\(#([^)]*)\)", text), *re.findall('href="#([^"]*)"', text)} <= names


def test_the_style_does_not_outlive_a_figure():
  before = dict(matplotlib.rcParams)
  plots.svg(plots.history([ONE], "run"))
  assert dict(matplotlib.rcParams) == before


def test_curves_of_rates_are_shown_in_a_square_from_0_to_1():
  (axes,) = draw(plots.curves([("one", [0.5, 1], [0.25, 1], plots.ACCENT)], "Title", "x", "y", "diagonal"))
  assert points(axes) == [[[0, 0], [1, 1]], [[0.5, 0.25], [1, 1]]]
  assert axes.get_xlim() == axes.get_ylim() == (-0.01, 1.01)
  assert axes.get_aspect() == 1


def test_models_are_points_of_their_training_time_with_a_legend_outside():
  shown = [
    (name * 30, seconds, accuracy, {"marker": "o"})
    for name, seconds, accuracy in (("slow", 700.0, 85.0), ("$x_{", 7.0, 91.0), ("c", 50.0, 90.0))
  ]
  figure = plots.curves(shown, "Title", "seconds", "accuracy (%)", "log")
  (axes,) = draw(figure)
  assert axes.get_xscale() == "log"
  assert points(axes) == [[[700, 85]], [[7, 91]], [[50, 90]]]
  (legend,) = figure.legends
  assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_histograms_count_each_review_once():
  values = {"a $": np.array([0.0, 0.01, 0.5, 1.0]), "b": np.array([0.99])}
  (axes,) = draw(plots.histogram(values, "probability of a $"))
  filled, _, other, _ = axes.patches
  assert filled.get_data().values.tolist() == [2] + [0] * 19 + [1] + [0] * 18 + [1]
  assert other.get_data().values.sum() == 1


def test_groups_have_rate_interval_and_count():
  rows = np.array([[0.5, 1.0], [0.25, 0.75], [0.75, 1.0], [4, 12_345]])
  (axes,) = draw(plots.groups(["1–2", "3"], rows, "Title", "words"))
  assert points(axes) == [[[0, 50], [1, 100]]]
  bars = [segment.tolist() for segment in axes.collections[0].get_segments()]
  assert bars == [[[0, 25], [0, 75]], [[1, 75], [1, 100]]]
  assert [label.get_text() for label in axes.get_xticklabels()] == ["1–2\n4", "3\n12,345"]
