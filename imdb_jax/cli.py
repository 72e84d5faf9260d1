"""The commands of `imdb-jax`: arguments to calls."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imdb_jax import arguments, exits
from imdb_jax.config import Config, DataConfig, RuntimeConfig, TrainingConfig, default_cache_dir
from imdb_jax.errors import UsageError, reraise_as
from imdb_jax.validation import flag


def main() -> None:
  """Run `imdb-jax COMMAND ...`."""
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # As in the scripts: see `exits.interruptible`.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  with exits.clear_errors():
    if name == "--version":
      print(f"imdb_jax {importlib.metadata.version('imdb_jax')}")
    elif name in ("-h", "--help"):
      print("usage: imdb-jax COMMAND ...\n\ncommands (each has --help):")
      print("\n".join(f"  {name:<10}{command.__doc__}" for name, command in _COMMANDS.items()))
    elif name not in _COMMANDS:
      raise UsageError(f"{name:.80}: unknown command. There are {', '.join(_COMMANDS)}.")
    else:
      _COMMANDS[name](f"imdb-jax {name}", sys.argv[2:])


def run(name: str) -> None:
  """Run a command from a script of its own, `python scripts/COMMAND.py ...`."""
  with exits.clear_errors():
    _COMMANDS[name](f"python {sys.argv[0]}", sys.argv[1:])


def _train(prog: str, args: Sequence[str]) -> None:
  """Train a text classifier, or resume its training."""
  _fit(prog, args, arguments.parse_config(prog, args))


def _pretrain(prog: str, args: Sequence[str]) -> None:
  """Train a language model, from which a classifier can start."""
  examples = """\
  {0}                                the reviews of IMDB: an hour on two cores
  {0} --data sample --no-unlabelled  a demonstration without a download
  {0} --data mine.csv --unlabelled-data more.csv"""
  config = arguments.parse_config(prog, args, str(_pretrain.__doc__), examples, "language")
  if config.training.objective != "next_word":
    raise UsageError(f"--preset {config.preset}: is no language model; the command for classifiers is train.")
  _fit(prog, args, config)


def _fit(prog: str, args: Sequence[str], config: Config) -> None:
  exits.require_memory()
  from imdb_jax import processes
  from imdb_jax.training.loop import fit

  process = processes.name(config.runtime)
  with processes.leaving(), exits.clear_errors(process), exits.interruptible():
    try:
      fit(config)
    except processes.Interrupted as stop:
      again = f"{prog} {shlex.join(args)}"
      exits.end(128 + stop.signal, f"Saved step {stop.step:,} in {config.run_dir}. Resume with:\n  {again}", process)
    import jax

    # Only the first process prints.
    if jax.process_index() > 0:
      return
    run_dir = shlex.quote(str(config.run_dir))
    before, _, after = prog.rpartition("train")
    if config.training.objective == "next_word":
      data = "" if config.data.source == "imdb" else f" --data {shlex.quote(config.data.source)}"
      print(f"\nNext:\n  {before.removesuffix('pre')}train{after} --preset pretrained{data} --init-from {run_dir}")
      return
    text = "A film I will not forget." if config.data.source in ("imdb", "sample") else "A text of yours."
    print(f"\nNext:\n  {before}evaluate{after} {run_dir}")
    print(f'  {before}predict{after} {run_dir} "{text}"')
    print(f"  {config.run_dir / 'report.html'} shows figures and reviews")


def _path(text: str) -> Path:
  # Shells leave the ~ of --output=~/x alone.
  return Path(os.path.expanduser(text))  # noqa: PTH111


def _restoring(prog: str, command: Callable[..., None], *, several: bool = True) -> arguments.Parser:
  """Return a parser with the flags of a command that restores a run, or several as an ensemble; see `_load`."""
  parser = arguments.Parser(prog=prog, description=command.__doc__)
  parser.add_argument("run_dir", metavar="RUN_DIR", type=_path, help="Run directory.")
  parser.add_argument("--step", default="best", help="Checkpoint: best (validation accuracy), latest or a number.")
  parser.add_argument("--platform", default="auto", metavar="{auto,cpu,gpu,tpu}", help="Where to compute.")
  no_calibration = "Ignore the temperature that a run with --validation split fits to the held-out reviews."
  parser.add_argument("--no-calibration", dest="calibrate", action="store_false", help=no_calibration)
  parser.set_defaults(others=[])
  if several:
    others: dict[str, Any] = {"dest": "others", "metavar": "RUN_DIR", "type": _path, "action": "append"}
    parser.add_argument("--with", **others, help="Another run, to average probabilities with; may be repeated.")
  return parser


def _load(given: Any, **runtime: Any):
  """Restore the runs that the arguments of a command name, as an ensemble of one or more."""
  if given.step not in ("best", "latest"):
    if not given.step.isdecimal():
      raise UsageError(f"--step {given.step!r:.80}: must be best, latest or a number.")
    given.step = int(given.step)
  settings = RuntimeConfig(platform=given.platform, **runtime)
  exits.require_memory()
  from imdb_jax import devices
  from imdb_jax.prediction import Classifier, Ensemble

  devices.keep_freed_memory(settings)
  loading = {"step": given.step, "runtime": settings, "calibrate": given.calibrate}
  return Ensemble([Classifier.load(run_dir, **loading) for run_dir in (given.run_dir, *given.others)])


def _evaluate(prog: str, args: Sequence[str]) -> None:
  """Evaluate a checkpoint of a run."""
  parser = _restoring(prog, _evaluate)
  parser.add_argument("--json", action="store_true", help="Print JSON.")
  parser.add_argument("--split", default="test", choices=("test", "validation", "train"), help="Reviews to evaluate.")
  parser.add_argument("--data", type=_path, help="Other labelled texts: a CSV or JSONL file, or a folder.")
  parser.add_argument("--archive", type=_path, help="Local aclImdb archive, if the reviews are not cached.")
  parser.add_argument("--cache-dir", type=_path, default=default_cache_dir(), help="Cache folder for reviews.")
  given = parser.parse_args(args)
  ensemble = _load(given, archive=given.archive, cache_dir=given.cache_dir)
  from imdb_jax.data import tokens
  from imdb_jax.evaluation import lines

  runs, splits, report = [], [], functools.partial(print, file=sys.stderr)
  with exits.interruptible():
    for each in ensemble.classifiers:
      if given.data is None:
        splits.append(each.read_split(given.split, report))
      else:
        splits.append(tokens.read(given.data, each.vocabulary, each.classes, report))
      runs.append({"run_dir": str(each.config.run_dir), "step": each.step, "temperature": each.temperature})
  result, kind, parts = {}, "runs", runs
  if given.others:
    evaluation = ensemble.evaluate(splits)
  else:
    (classifier,), (split,) = ensemble.classifiers, splits
    evaluation = classifier.evaluate(split)
    result, kind, parts = runs[0], "seeds", [{"seed": seed} for seed in classifier.config.training.seeds]
  result |= ({"data": str(given.data)} if given.data else {"split": given.split}) | evaluation.figures()
  parts = [part | metrics.figures() for part, metrics in zip(parts, evaluation.seeds, strict=True)]
  if given.json:
    print(json.dumps(result | {kind: parts}))
    return
  result["accuracy_interval"] = "{:.4f} to {:.4f} (95%)".format(*result["accuracy_interval"])
  if len(parts) > 1:
    result |= {f"accuracy, {part.get('run_dir') or 'seed ' + str(part['seed'])}": part["accuracy"] for part in parts}
  print("\n".join(lines(result)))


def _predict(prog: str, args: Sequence[str]) -> None:
  """Classify texts: those given, or all of a file."""
  parser = _restoring(prog, _predict)
  parser.add_argument("--json", action="store_true", help="Print JSON.")
  parser.add_argument("texts", metavar="TEXT", nargs="*", help="Reviews; without any, they are read from --file.")
  parser.add_argument("--file", default="-", help="CSV or JSONL, or a review per line; - is standard input. [-]")
  parser.add_argument("--text-column", metavar="NAME", help="Column of the texts. [that of the training texts]")
  parser.add_argument("--output", type=_path, help="Write the rows with their answers to this .csv, .tsv or .jsonl.")
  parser.add_argument("--escape-formulas", action="store_true", help="Disarm cells that a spreadsheet would execute.")
  parser.add_argument("--threshold", type=float, metavar="P", help="Answer the second of two classes from P on.")
  parser.add_argument("--abstain-below", type=float, default=0, metavar="P", help="Answer no class below P. [0]")
  given = parser.parse_args(args)
  if given.texts and (given.file != "-" or given.output):
    name, value = ("--file", given.file) if given.file != "-" else ("--output", given.output)
    raise UsageError(f"{name} {value}: cannot be combined with reviews on the command line.")
  if given.escape_formulas and not given.output:
    raise UsageError("--escape-formulas: requires --output.")
  for name in ("threshold", "abstain_below"):
    if not 0 <= (getattr(given, name) or 0) <= 1:
      raise UsageError(f"{flag(name)} {getattr(given, name)}: must be from 0 to 1.")
  ensemble = _load(given)
  if given.threshold is not None and len(ensemble.classes) != 2:
    raise UsageError(f"--threshold {given.threshold}: requires two classes, not {len(ensemble.classes):,}.")
  from imdb_jax import scoring

  answers = functools.partial(ensemble.answers, threshold=given.threshold, abstain_below=given.abstain_below)
  column = given.text_column or ensemble.classifiers[0].config.data.text_column
  windows = scoring.of_lines([given.texts]) if given.texts else scoring.read(given.file, column)
  with exits.interruptible(), contextlib.closing(windows):
    if given.output is None:
      scoring.show(windows, answers, is_json=given.json)
    else:
      options = {"source": given.file, "escape_formulas": given.escape_formulas}
      print(f"{given.output}: {scoring.write(windows, answers, given.output, **options):,} rows")


def _explain(prog: str, args: Sequence[str]) -> None:
  """Show by how much each word of a text speaks for a class."""
  parser = _restoring(prog, _explain, several=False)
  parser.add_argument("--json", action="store_true", help="Print JSON.")
  parser.add_argument("--html", type=_path, metavar="FILE", help="Write a page with colored words.")
  parser.add_argument("--class", dest="label", metavar="NAME", help="Class. [the second of two, or the answer]")
  parser.add_argument("texts", metavar="TEXT", nargs="+", help="Reviews.")
  given = parser.parse_args(args)
  (classifier,) = _load(given).classifiers
  from imdb_jax import explanation
  from imdb_jax.report import page

  with exits.interruptible():
    found = classifier.explain(given.texts, given.label)
  if given.html is not None:
    with reraise_as(UsageError, f"--html {given.html}"):
      shown = [(explanation.summary(each), explanation.to_html(each)) for each in found]
      # Arguments may hold what is no character.
      given.html.write_text(page.render("explanations.html", explanations=shown), encoding="utf-8", errors="replace")
  is_colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
  for each in found:
    print(json.dumps(dataclasses.asdict(each)) if given.json else explanation.to_terminal(each, is_colored=is_colored))


def _serve(prog: str, args: Sequence[str]) -> None:
  """Answer predictions over HTTP, and show a page to type texts into."""
  parser = _restoring(prog, _serve)
  parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. [127.0.0.1]")
  parser.add_argument("--port", type=int, default=8000, help="Port to listen on; 0 takes a free one. [8000]")
  given = parser.parse_args(args)
  with reraise_as(UsageError, "starlette and uvicorn are missing: pip install 'imdb_jax[serve]'", ImportError):
    from imdb_jax.serving import service
  with service.listen(given.host, given.port) as listener:
    service.serve(_load(given), listener)


def _export(prog: str, args: Sequence[str]) -> None:
  """Write the model of a run for use elsewhere."""
  parser = _restoring(prog, _export, several=False)
  choices = ("safetensors", "stablehlo")
  parser.add_argument("--format", default=choices[0], choices=choices, help="Weights, or a compiled program.")
  parser.add_argument("--output", type=_path, required=True, help="Folder to create.")
  given = parser.parse_args(args)
  # The other implementations may compute in another precision than what is exported.
  (classifier,) = _load(given, implementation="scan").classifiers
  from imdb_jax.export import export

  with exits.interruptible():
    export(classifier, given.format, given.output)
  print(given.output)


def _plot(prog: str, args: Sequence[str]) -> None:
  """Plot accuracy and loss of a run, training against validation."""
  parser = arguments.Parser(prog=prog, description=_plot.__doc__)
  parser.add_argument("run_dir", metavar="RUN_DIR", type=_path, help="Run directory.")
  parser.add_argument("--output", type=_path, help="File to write: .png, .pdf or .svg. [RUN_DIR/history.png]")
  given = parser.parse_args(args)
  from imdb_jax import plots
  from imdb_jax.store import metrics_log

  output = given.output or given.run_dir / "history.png"
  with reraise_as(UsageError, f"--output {output}: cannot be written"):
    plots.save(plots.history(metrics_log.read(given.run_dir)[0], given.run_dir.resolve().name), output)
  print(output)


def _report(prog: str, args: Sequence[str]) -> None:
  """Write a page about a run, or one that compares several."""
  parser = _restoring(prog, _report, several=False)
  parser.add_argument("--split", default="test", choices=("test", "validation", "train"), help="Reviews to show.")
  parser.add_argument("more", metavar="RUN_DIR", type=_path, nargs="*", help="Runs to compare with the first one.")
  parser.add_argument("--output", type=_path, help="Page to write. [RUN_DIR/report.html; of several: comparison.html]")
  parser.add_argument("--figures", type=_path, metavar="FOLDER", help="Write the figures of a run as PNG and SVG, too.")
  parser.add_argument("--archive", type=_path, help="Local aclImdb archive of the reviews.")
  parser.add_argument("--cache-dir", type=_path, default=default_cache_dir(), help="Cache folder for reviews.")
  given = parser.parse_args(args)
  given.others, show = given.more, functools.partial(print, file=sys.stderr)
  classifiers = _load(given, archive=given.archive, cache_dir=given.cache_dir).classifiers
  from imdb_jax.comparison import runs

  with exits.interruptible():
    print(runs.write(classifiers, given.split, show, given.output, given.figures))


def _check(prog: str, args: Sequence[str]) -> None:
  """Describe labelled texts before training, and warn of problems: check FILE, with flags of train."""
  flags = [each for each in args if each != "--json"]
  if not flags or (flags[0].startswith("-") and flags[0] not in ("-h", "--help", "--version")):
    raise UsageError(f"FILE: missing. The command is {prog} FILE [--json] [--FLAG VALUE ...], with the flags of train.")
  flags = flags if flags[0].startswith("-") else ["--data", *flags]
  examples = "  {0} reviews.csv\n  {0} reviews.csv --text-column review --preset strong\n  {0} folder --json"
  config = arguments.parse_config(prog, flags, str(_check.__doc__), examples)
  from imdb_jax import checking

  with exits.interruptible():
    result = checking.check(config)
  print(json.dumps(result) if "--json" in args else "\n".join(checking.lines(config, result)))


def _prepare(prog: str, args: Sequence[str]) -> None:
  """Prepare the tensorflow-datasets store from a local archive."""
  parser = arguments.Parser(prog=prog, description=_prepare.__doc__)
  parser.add_argument("--archive", type=_path, required=True, help="Local aclImdb archive.")
  parser.add_argument("--data-dir", type=_path, default=default_cache_dir(), help="Folder to write the store to.")
  given = parser.parse_args(args)
  with reraise_as(UsageError, "A record store needs tensorflow-datasets and array-record", ImportError):
    from imdb_jax.data import tfds_imdb
  with exits.interruptible():
    print(tfds_imdb.prepare(given.data_dir, given.archive))


def _compare(prog: str, args: Sequence[str]) -> None:
  """Compare models on the same reviews; the same command again continues."""
  parser = arguments.Parser(prog=prog, description=_compare.__doc__)
  parser.add_argument("--rows", metavar="A,B,...", help="Models to compute. [all that are installed]")
  parser.add_argument("--num-seeds", type=int, default=1, metavar="N", help="Models per row, with different seeds. [1]")
  parser.add_argument("--quick", action="store_true", help="Small models on the sample, in two minutes.")
  parser.add_argument("--data", help="imdb, sample, or a CSV or JSONL file or folder with two classes. [imdb]")
  parser.add_argument("--validation", default="test", metavar="{test,split}", help="Test or held-out reviews. [test]")
  parser.add_argument("--archive", type=_path, help="Local aclImdb archive; otherwise it is downloaded.")
  parser.add_argument("--cache-dir", type=_path, default=default_cache_dir(), help="Cache folder for reviews.")
  parser.add_argument("--run-dir", type=_path, default=Path("runs/compare"), help="Folder to use. [runs/compare]")
  parser.add_argument("--platform", default="auto", metavar="{auto,cpu,gpu,tpu}", help="Where to compute.")
  given = parser.parse_args(args)
  places = {name: getattr(given, name) for name in ("archive", "cache_dir", "run_dir", "platform")}
  config = Config(
    data=DataConfig(source=given.data or ("sample" if given.quick else "imdb"), validation=given.validation),
    training=TrainingConfig(num_seeds=given.num_seeds),
    runtime=RuntimeConfig(**places),
  )
  exits.require_memory()
  from imdb_jax import processes
  from imdb_jax.comparison import rows

  with exits.clear_errors(), exits.interruptible():
    try:
      rows.compare(config, rows.DEFAULT_ROWS if given.rows is None else given.rows.split(","), quick=given.quick)
    except (processes.Interrupted, KeyboardInterrupt) as stop:
      number = getattr(stop, "signal", signal.SIGINT)
      exits.end(128 + number, f"Saved in {given.run_dir}. Resume with:\n  {prog} {shlex.join(args)}")


_COMMANDS = {"train": _train, "evaluate": _evaluate, "predict": _predict, "explain": _explain, "report": _report}
_COMMANDS |= {"compare": _compare, "serve": _serve, "export": _export, "check": _check, "plot": _plot}
_COMMANDS |= {"prepare": _prepare, "pretrain": _pretrain}
