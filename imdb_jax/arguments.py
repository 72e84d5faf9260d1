"""Command-line flags: a parser that suggests similar flags, and flags made from the settings of a run."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from imdb_jax import presets
from imdb_jax.config import Config
from imdb_jax.errors import UsageError
from imdb_jax.validation import flag, options

_COMMON = ("source", "archive", "run_dir", "epochs", "platform")
_SEVERAL_MACHINES = ("distributed", "coordinator_address", "num_processes", "process_id")
_TRAIN = "Train a text classifier, or resume its training."
_EXAMPLES = """\
  {0} --preset sample                      a demonstration without a download
  {0} --preset fast                        better than the article, in seconds
  {0} --preset strong                      far more accurate, in minutes
  {0} --platform gpu --num-seeds 8         an ensemble of eight, on a GPU"""


class Parser(argparse.ArgumentParser):
  """An argument parser that refuses abbreviations, suggests similar flags, and raises UsageError."""

  def __init__(self, **settings: Any):
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)
    self.add_argument("--version", action="version", version=f"imdb_jax {importlib.metadata.version('imdb_jax')}")

  def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
    """Parse all arguments; raise UsageError if a flag is unknown, or lacks its value."""
    # Texts may follow flags, as in `predict RUN_DIR --json TEXT`.
    parsed, unknown = self.parse_known_intermixed_args(args, namespace)
    if unknown:
      similar = _similar(unknown[0].split("=")[0], [name for name in self._option_string_actions if name[:2] == "--"])
      hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
      raise UsageError(f"{unknown[0]:.80}: unknown.{hint} See --help.")
    return parsed

  def error(self, message: str) -> NoReturn:
    """Raise UsageError."""
    raise UsageError(f"{message.removeprefix('argument ')}. See --help.")


def _similar(name: str, flags: list[str]) -> list[str]:
  """Return the flags that a misspelt or abbreviated flag may mean."""
  wanted = name.strip("-")
  abbreviated = [each for each in flags if wanted and wanted == "".join(word[:1] for word in each[2:].split("-"))]
  longer = [each for each in flags if len(wanted) > 2 and wanted in each]
  return abbreviated or difflib.get_close_matches(name, flags, n=1, cutoff=0.75) or longer[:3]


def parse_config(
  prog: str, args: Sequence[str], description: str = _TRAIN, examples: str = _EXAMPLES, preset: str = "article"
) -> Config:
  """Return the settings that command-line arguments describe: those of the preset, and the other flags over them.

  `prog`, `description` and `examples` are for the help; `preset` is the one without --preset. Raises UsageError if a
  flag or value is invalid.
  """
  chooser = Parser(add_help=False)
  chooser.add_argument("--preset", default=preset)
  chosen = presets.preset(chooser.parse_known_args(args)[0].preset)
  parser = Parser(
    prog=prog,
    usage="%(prog)s [--preset NAME] [--FLAG VALUE ...]",
    description=description,
    epilog=f"examples:\n{examples.format(prog)}",
  )
  groups = {name: parser.add_argument_group(name) for name in ("common", "data", "training", "model", "optimizer")}
  groups |= {"runtime": parser.add_argument_group("runtime"), "machines": parser.add_argument_group("several machines")}
  names = ", ".join(presets.PRESETS)
  groups["common"].add_argument("--preset", metavar="NAME", help=f"Settings to start from: {names}. [{preset}]")
  sections = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(Config)[1:]}
  for section, settings in sections.items():
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
      name = field.name
      group = "common" if name in _COMMON else "machines" if name in _SEVERAL_MACHINES else section
      _add(groups[group], name, options(hints[name]), field.metadata["doc"], getattr(settings, name))
  given = vars(parser.parse_args(args))
  for section, settings in sections.items():
    changes = {field.name: given[field.name] for field in dataclasses.fields(settings) if field.name in given}
    sections[section] = dataclasses.replace(settings, **changes)
  return dataclasses.replace(chosen, **sections)


def _add(group: Any, name: str, kinds: tuple[Any, ...], doc: str, default: Any) -> None:
  shown = "" if default is None or "default" in doc or default is False else f" [{default}]"
  settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": (doc + shown).replace("%", "%%")}
  if bool in kinds:
    group.add_argument(flag(name), action=argparse.BooleanOptionalAction, **settings)
    return
  choices = [",".join(typing.get_args(kind)) for kind in kinds if typing.get_origin(kind) is Literal]
  metavar = f"{{{choices[0]}}}" if choices else {int: "N", float: "X", str: "TEXT"}.get(kinds[0], "PATH")
  group.add_argument(flag(name), type=lambda text: _parse(text, kinds), metavar=metavar, **settings)


def _parse(text: str, kinds: tuple[Any, ...]) -> Any:
  """Return the value that a text stands for; what is not one of these types is left to the settings to refuse."""
  if types.NoneType in kinds and text == "None":
    return None
  for number in {int, float}.intersection(kinds):
    with contextlib.suppress(ValueError):
      return number(text)
  return text
