"""The end of a run: a table on the console, and `report.md` and `history.png` beside the checkpoints."""

import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from imdb_jax import plots
from imdb_jax.config import Config
from imdb_jax.training.console import Console, decimal
from imdb_jax.training.recorder import write_history

_METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
_COLUMNS = ("epoch", *_METRICS, "seconds", "evaluation_seconds")


def _cells(line: dict[str, Any]) -> list[str]:
  return [
    str(line["epoch"]),
    *(decimal(line[name]) for name in _METRICS),
    *(f"{line[name]:.1f}" for name in _COLUMNS[5:]),
  ]


def epoch_line(line: dict[str, Any], num_epochs: int) -> str:
  """An epoch in one line."""
  names = (*_METRICS, "ensemble_accuracy") if "seeds" in line else _METRICS
  values = "  ".join(f"{name} {decimal(line[name])}" for name in names)
  return (
    f"Epoch {line['epoch']}/{num_epochs}  {values}  "
    f"{line['seconds']:.1f} s training, {line['evaluation_seconds']:.1f} s evaluation"
  )


def best(history: list[dict[str, Any]]) -> dict[str, Any]:
  """The epoch with the highest validation accuracy; of equals the last, which is also the best checkpoint."""
  return max(reversed(history), key=lambda line: line["val_accuracy"])


def _val_accuracy(line: dict[str, Any]) -> str:
  """Of an epoch; of several seeds the mean and how far they spread."""
  mean = f"val_accuracy {line['val_accuracy']:.4f}"
  if "seeds" not in line:
    return mean
  values = [of_seed["val_accuracy"] for of_seed in line["seeds"]]
  spread = f"sample standard deviation, n = {len(values)}; minimum {min(values):.4f}, maximum {max(values):.4f}"
  return f"{mean} ± {statistics.stdev(values):.4f} ({spread}), ensemble_accuracy {line['ensemble_accuracy']:.4f}"


def _seed_cells(of_seed: dict[str, Any]) -> list[str]:
  return [str(of_seed["seed"]), *(decimal(of_seed[name]) for name in _METRICS)]


def _markdown_table(columns: Sequence[str], rows: list[list[str]]) -> str:
  return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def _chosen_on(config: Config) -> str:
  if config.dataset.validation == "test":
    return "chosen on the test reviews, as in the article: it flatters; the last epoch does not"
  return "chosen on reviews held out of training"


def show(config: Config, history: list[dict[str, Any]], console: Console) -> None:
  """The closing table and the commands that people want next."""
  columns = [name.replace("evaluation_seconds", "eval s") for name in _COLUMNS]
  least = ("eval s", "seconds", "loss", "accuracy", "val_loss")
  console.table("History", columns, list(map(_cells, history)), least=least)
  top, last = best(history), history[-1]
  if "seeds" in last:
    console.table("Last epoch by seed", ["seed", *_METRICS], list(map(_seed_cells, last["seeds"])), least=least[2:])
    console.line(f"Last epoch: {_val_accuracy(last)}")
  console.line(f"Best epoch {top['epoch']}: {_val_accuracy(top)} ({_chosen_on(config)})")
  run_dir = shlex.quote(str(config.run_dir))
  console.line()
  console.line("Next:")
  console.line(f"  python scripts/evaluate.py {run_dir}")
  console.line(f'  python scripts/predict.py {run_dir} "A film I will not forget."')
  console.line(f"  {config.run_dir / 'history.png'} shows the curves")


def write(config: Config, history: list[dict[str, Any]]) -> None:
  """Writes history.csv, history.png and report.md into the run directory."""
  write_history(config.run_dir, history)
  plots.plot_history(config.run_dir, config.run_dir / "history.png")
  table = _markdown_table(_COLUMNS, list(map(_cells, history)))
  top, last = best(history), history[-1]
  total = sum(line["seconds"] + line["evaluation_seconds"] for line in history)
  settings = ", ".join(
      f"{name} {value}" for section in config.to_dict().values() if isinstance(section, dict)
      for name, value in section.items()
  )  # fmt: skip
  if "seeds" in last:
    table += "\n\nThe means of the seeds; seed by seed after the last epoch:\n\n"
    table += _markdown_table(("seed", *_METRICS), list(map(_seed_cells, last["seeds"])))
  text = f"""# Run `{config.run_dir.name}`, preset {config.preset}

Last epoch: {_val_accuracy(last)}.
Best epoch: {top["epoch"]}, {_val_accuracy(top)} ({_chosen_on(config)}).
Training and evaluation: {total:.0f} s, compilation apart.

{table}

![Accuracy and loss](history.png)

Settings: {settings}. Versions, devices and the digest of the data are in `provenance.json`.
"""
  (config.run_dir / "report.md").write_text(text, encoding="utf-8")
