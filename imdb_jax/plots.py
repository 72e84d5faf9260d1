"""Figures of runs and comparisons, in one style. They need no display."""

import functools
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from imdb_jax.errors import UsageError, printable
from imdb_jax.store import files

_FORMATS = (".png", ".pdf", ".svg")
_MAX_TITLE, _MAX_SEEDS = 60, 100
# Width and height in inches of figures of which three are side by side.
_SMALL = (3.7, 3.5)
# The style sheet of the reports has a variable of each name, for light and dark; plots.mplstyle uses them, too.
COLORS = {"text": "#1d1d1b", "soft": "#6b6b66", "grid": "#e3e3dd", "accent": "#2563a8", "other": "#b8561f"}
_STYLE = Path(__file__).with_suffix(".mplstyle")
# Label, x, y and the style of a curve.
Curve = tuple[str, Any, Any, dict[str, Any]]
ACCENT, OTHER, SOFT = ({"color": COLORS[name]} for name in ("accent", "other", "soft"))


def _styled(function: Callable[..., Any]) -> Any:
  """Apply the style to what a function draws or writes; matplotlib takes long to import, and is seldom needed."""

  @functools.wraps(function)
  def styled(*args: Any, **kwargs: Any) -> Any:
    import matplotlib.style

    with matplotlib.style.context(_STYLE), warnings.catch_warnings():
      # The font lacks many letters that a name may have.
      warnings.filterwarnings("ignore", "Glyph", UserWarning)
      return function(*args, **kwargs)

  return styled


def _figure(width: float = 5.2, height: float = 3.4) -> Any:
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def _count_in_whole_numbers(axes: Any) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


@_styled
def svg(figure: Any) -> str:
  """Return a figure as an element of a page, whose style sheet has the colours as variables."""
  file = io.StringIO()
  figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
  text = file.getvalue()
  # Names are unique in a page, except those that clip paths and markers refer to, which follow from their content.
  text = re.sub(r' id="(?![mpC][0-9a-f_]{9})[^"]*"', "", text[text.index("<svg") :])
  for name, color in COLORS.items():
    text = text.replace(color, f"var(--{name}, {color})")
  # A file needs these, a page does not.
  return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


@_styled
def save(figure: Any, output: Path) -> None:
  """Write a figure; raise UsageError if the file has another suffix, or is a link."""
  if output.suffix.lower() not in _FORMATS:
    raise UsageError(f"{output}: its name must end in one of {', '.join(_FORMATS)}.")
  if output.is_symlink():
    raise UsageError(f"{output}: is a link, which is not followed.")
  with files.aside(output) as unfinished, unfinished.open("xb") as file:
    figure.savefig(file, format=output.suffix[1:].lower(), dpi=150)


@_styled
def history(
  lines: list[dict[str, Any]],
  title: str = "",
  validation: str = "validation",
  reference: Mapping[str, Sequence[float]] | None = None,
  names: Sequence[str] = ("accuracy", "loss"),
) -> Any:
  """Return the figure of some metrics by epoch, side by side.

  `lines` has one dict per epoch, see `store.metrics_log`; `validation` says what the validation reviews are. The
  metrics of the article by epoch may be shown as a `reference`. Raises UsageError if there are no lines.
  """
  if not lines:
    raise UsageError(f"{title}: no epoch has been finished yet.")
  figure = _figure(5.2 * len(names), 3.4)
  for axes, name in zip(figure.subplots(1, len(names), squeeze=False).ravel(), names, strict=True):
    _draw_metric(axes, lines, name, validation, reference or {})
  if title:
    shown = printable(title if len(title) <= _MAX_TITLE else f"{title[: _MAX_TITLE - 1]}…")
    figure.suptitle(f"{shown}: {len(lines)} epoch{'s' if len(lines) != 1 else ''}")
  return figure


def _draw_metric(
  axes: Any, lines: list[dict[str, Any]], name: str, validation: str, reference: Mapping[str, Sequence[float]]
) -> None:
  """Draw a metric by epoch: seeds as thin lines, their mean or ensemble in bold, and the best validation value."""
  epochs = [line["epoch"] for line in lines]
  for field, label, style in ((name, "training", SOFT), (f"val_{name}", validation, ACCENT)):
    seeds = _finite([[seed[field] for seed in line["seeds"]] for line in lines])
    if seeds.shape[1] > 1:
      thin = {"linewidth": 0.7, "alpha": 0.45, "marker": "." if len(epochs) == 1 else "", **style}
      axes.plot(epochs, seeds[:, :_MAX_SEEDS], **thin)
    axes.plot(epochs, _finite([line[field] for line in lines]), **style, marker="o", markersize=3.5, label=label)
    if field in reference:
      shown = reference[field]
      axes.plot(range(1, len(shown) + 1), shown, **style, linewidth=1, linestyle=":", label=f"article, {label}")
  values = _finite([line[f"val_{name}"] for line in lines])
  if not np.isnan(values).all():
    best = np.nanargmax(values) if name == "accuracy" else np.nanargmin(values)
    # On the side where the training curve is not.
    offset = -8 if lines[best][name] > values[best] else 8
    place: Any = epochs[best], values[best]
    axes.plot(*place, marker="o", markersize=8, markerfacecolor="none", **ACCENT)
    style = {"ha": "center", "va": "bottom" if offset > 0 else "top", **ACCENT}
    axes.annotate(f"{values[best]:.4f}", place, textcoords="offset points", xytext=(0, offset), **style)
  axes.set(title=f"{name.capitalize()} by epoch", xlabel="epoch")
  axes.margins(x=0.08, y=0.15)
  _count_in_whole_numbers(axes)
  axes.legend(loc="best")


def _finite(values: Any) -> np.ndarray:
  """Return numbers with NaN in place of those that no axis has room for."""
  array = np.array(values, np.float64)
  return np.where(np.abs(array) < 1e6, array, np.nan)


@_styled
def curves(
  shown: Sequence[Curve], title: str, xlabel: str, ylabel: str, kind: Literal["", "unit", "diagonal", "log"] = ""
) -> Any:
  """Return the figure of some curves.

  Its kind may be "unit", whose axes are from 0 to 1; "diagonal", which has the diagonal as well; or "log", with a
  logarithmic horizontal axis.
  """
  from matplotlib.ticker import LogLocator

  is_unit = kind in ("unit", "diagonal")
  figure = _figure(*_SMALL) if is_unit else _figure()
  axes = figure.subplots()
  if kind == "diagonal":
    axes.plot([0, 1], [0, 1], linewidth=1, linestyle=":", **SOFT)
  for label, x, y, style in shown:
    axes.plot(x, _finite(y), label=printable(label), **style)
  axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
  if is_unit:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
  elif kind == "log":
    axes.set_xscale("log", subs=[])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
  else:
    _count_in_whole_numbers(axes)
  if any(label for label, *_ in shown):
    figure.legend(loc="outside lower center", ncols=3) if len(shown) > 2 else axes.legend(loc="best")
  return figure


@_styled
def histogram(parts: Mapping[str, np.ndarray], xlabel: str) -> Any:
  """Return the figure of the probabilities of two groups of reviews, by name, in 40 bins from 0 to 1."""
  figure = _figure(*_SMALL)
  axes = figure.subplots()
  for (label, values), style in zip(parts.items(), (OTHER, ACCENT), strict=True):
    counts, edges = np.histogram(values, bins=40, range=(0, 1))
    axes.stairs(counts, edges, fill=True, alpha=0.3, **style)
    axes.stairs(counts, edges, label=label, linewidth=1.5, **style)
  axes.set(title="Probabilities", xlabel=xlabel, ylabel="reviews", yscale="log", ylim=(0.7, None))
  axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
  axes.legend(loc="upper center")
  return figure


@_styled
def groups(names: Sequence[Any], rows: np.ndarray, title: str, xlabel: str) -> Any:
  """Return the figure of the accuracies of groups of reviews, from `report.numbers.accuracy_in_groups`."""
  figure = _figure(*_SMALL)
  axes, places, (rates, low, high, sizes) = figure.subplots(), range(len(names)), rows
  axes.vlines(places, 100 * low, 100 * high, linewidth=6, alpha=0.25, **ACCENT)
  axes.plot(places, 100 * rates, marker="o", **ACCENT, linewidth=1)
  axes.set_xticks(places, [f"{name}\n{size:,.0f}" for name, size in zip(names, sizes, strict=True)], fontsize=7)
  axes.set(title=title, xlabel=xlabel, ylabel="accuracy (%)")
  axes.grid(axis="x", visible=False)
  return figure
