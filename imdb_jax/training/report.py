"""The end of a run: a table on the console, and `report.md` and `history.png` beside the checkpoints."""

import shlex
from typing import Any

from imdb_jax import plots
from imdb_jax.config import Config
from imdb_jax.training.console import Console
from imdb_jax.training.recorder import write_history

_COLUMNS = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "evaluation_seconds")


def _cells(line: dict[str, Any]) -> list[str]:
  return [
    str(line["epoch"]),
    *(f"{line[name]:.4f}" for name in _COLUMNS[1:5]),
    *(f"{line[name]:.1f}" for name in _COLUMNS[5:]),
  ]


def epoch_line(line: dict[str, Any], num_epochs: int) -> str:
  """An epoch in one line."""
  names = ("loss", "accuracy", "val_loss", "val_accuracy")
  values = "  ".join(f"{name} {line[name]:.4f}" for name in names)
  return (
    f"Epoch {line['epoch']}/{num_epochs}  {values}  "
    f"{line['seconds']:.1f} s training, {line['evaluation_seconds']:.1f} s evaluation"
  )


def best(history: list[dict[str, Any]]) -> dict[str, Any]:
  """The epoch with the highest validation accuracy; of equals the last, which is also the best checkpoint."""
  return max(reversed(history), key=lambda line: line["val_accuracy"])


def _chosen_on(config: Config) -> str:
  if config.dataset.validation == "test":
    return "chosen on the test reviews, as in the article: it flatters; the last epoch does not"
  return "chosen on reviews held out of training"


def show(config: Config, history: list[dict[str, Any]], console: Console) -> None:
  """The closing table and the commands that people want next."""
  console.table(
    "History", [name.replace("evaluation_seconds", "eval s") for name in _COLUMNS], list(map(_cells, history))
  )
  top = best(history)
  console.line(f"Best epoch {top['epoch']}: val_accuracy {top['val_accuracy']:.4f} ({_chosen_on(config)})")
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
  rows = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, history)]
  table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
  top, last = best(history), history[-1]
  total = sum(line["seconds"] + line["evaluation_seconds"] for line in history)
  settings = ", ".join(
      f"{name} {value}" for section in config.to_dict().values() if isinstance(section, dict)
      for name, value in section.items()
  )  # fmt: skip
  text = f"""# Run `{config.run_dir.name}`, preset {config.preset}

Last epoch: val_accuracy {last["val_accuracy"]:.4f}.
Best epoch: {top["epoch"]}, val_accuracy {top["val_accuracy"]:.4f} ({_chosen_on(config)}).
Training and evaluation: {total:.0f} s, compilation apart.

{table}

![Accuracy and loss](history.png)

Settings: {settings}. Versions, devices and the digest of the data are in `provenance.json`.
"""
  (config.run_dir / "report.md").write_text(text, encoding="utf-8")
