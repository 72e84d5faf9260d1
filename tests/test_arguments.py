"""Flags become settings, the help is short, and a misspelt flag suggests the right one."""

import dataclasses
import importlib.metadata
import re
from pathlib import Path

import pytest

from imdb_jax import arguments, cli
from imdb_jax.arguments import parse_config
from imdb_jax.config import Config
from imdb_jax.errors import UsageError
from imdb_jax.presets import PRESETS
from imdb_jax.validation import flag

GROUPS = ["common", "data", "training", "model", "optimizer", "runtime", "several machines", "examples"]


def parse(*args: str) -> Config:
  return parse_config("train", args)


def problem(*args: str) -> str:
  with pytest.raises(UsageError) as caught:
    parse(*args)
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


def settings() -> dict[str, object]:
  """Return the default of every setting that has a flag."""
  sections = [getattr(PRESETS["article"], field.name) for field in dataclasses.fields(Config)[1:]]
  return {name: value for section in sections for name, value in vars(section).items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_gives_its_settings(name):
  assert parse("--preset", name) == PRESETS[name]
  assert parse(f"--preset={name}") == PRESETS[name]


def test_without_flags_the_article_is_trained():
  assert parse() == PRESETS["article"]


@pytest.mark.parametrize("order", [1, -1])
def test_other_flags_override_the_preset_in_any_order(order):
  given = [["--preset", "fast"], ["--hidden-size", "3"], ["--num-seeds", "1"]][::order]
  config, fast = parse(*sum(given, [])), PRESETS["fast"]  # noqa: RUF017
  assert config == dataclasses.replace(
    fast,
    model=dataclasses.replace(fast.model, hidden_size=3),
    training=dataclasses.replace(fast.training, num_seeds=1),
  )


@pytest.mark.parametrize(
  ("args", "section", "name", "value"),
  [
    (["--data", "sample"], "data", "source", "sample"),
    (["--limit", "7"], "data", "limit", 7),
    (["--limit=None"], "data", "limit", None),
    (["--no-strip-html"], "data", "strip_html", False),
    (["--punctuation"], "data", "punctuation", True),
    (["--mask-padding"], "model", "mask_padding", True),
    (["--pooling", "max"], "model", "pooling", "max"),
    (["--learning-rate", "2e-3"], "optimizer", "learning_rate", 0.002),
    (["--learning-rate", "1"], "optimizer", "learning_rate", 1.0),
    (["--b1", "0"], "optimizer", "b1", 0.0),
    (["--epochs", "3"], "training", "epochs", 3),
    (["--run-dir", "a b"], "runtime", "run_dir", Path("a b")),
    (["--cache-dir", "~/x"], "runtime", "cache_dir", Path.home() / "x"),
    (["--save-every-seconds", "None"], "runtime", "save_every_seconds", None),
    (["--save-every-steps", "5"], "runtime", "save_every_steps", 5),
    (["--num-devices", "2"], "runtime", "num_devices", 2),
    (["--deterministic"], "runtime", "deterministic", True),
    (["--distributed"], "runtime", "distributed", True),
  ],
)
def test_a_flag_sets_its_setting(args, section, name, value):
  found = getattr(getattr(parse(*args), section), name)
  assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--epochs", "three"], r"--epochs 'three': must be a whole number from 1 to 100,000"),
    (["--epochs", "1.5"], r"--epochs '1\.5': must be a whole number"),
    (["--epochs", "0"], r"--epochs 0: must be a whole number from 1 to 100,000"),
    (["--learning-rate", "-1"], r"--learning-rate -1\.0: must be a number above 0"),
    (["--learning-rate", "nan"], r"--learning-rate nan: must be a number above 0"),
    (["--epochs", "None"], r"--epochs 'None': must be a whole number"),
    (["--pooling", "avg"], r"--pooling 'avg': must be one of last, mean, max"),
    (["--preset", "articel"], r"--preset articel: .*Did you mean article\?"),
    (["--epochs"], r"--epochs: expected one argument\. See --help"),
    (["--mask-padding=yes"], r"--mask-padding.*: ignored explicit argument 'yes'\. See --help"),
    (["--num-processes", "2"], r"--coordinator-address, --num-processes and --process-id go together"),
    (["--archive", "x", "--data", "sample"], r"--archive x: requires --data imdb"),
  ],
)
def test_a_wrong_value_is_refused_in_one_line(args, message):
  assert re.match(message, problem(*args))


@pytest.mark.parametrize(
  ("given", "meant"),
  [
    ("--lr", "--learning-rate"),
    ("--bs", "--batch-size"),
    ("--epoch", "--epochs"),
    ("--epohcs", "--epochs"),
    ("--batch_size=3", "--batch-size"),
    ("--learning_rate", "--learning-rate"),
    ("--learningrate", "--learning-rate"),
    ("--run_dir", "--run-dir"),
    ("--vocab-size", "--vocabulary-size"),
    ("--vocabulary", "--vocabulary-size"),
    ("--presets", "--preset"),
    ("--masked-padding", "--mask-padding"),
    ("--batch", "--batch-size"),
  ],
)
def test_a_misspelt_or_abbreviated_flag_suggests_the_right_one(given, meant):
  """Abbreviations are refused: a later version may have two flags that begin alike."""
  message = problem(given, "1")
  assert re.match(rf"{given}: unknown\. Did you mean .*{meant}\b.*\? See --help\.$", message)


@pytest.mark.parametrize("given", ["--xyz", "extra", "--", "-", "-x", "--lr5"])
def test_an_argument_like_no_flag_is_refused_without_a_guess(given):
  assert "Did you mean" not in problem(given, "1")


def test_a_word_of_several_flags_suggests_up_to_three():
  suggested = re.findall("--[a-z-]+-size", problem("--size", "1"))
  assert len(suggested) == 3


def test_a_long_unknown_argument_is_shortened():
  assert len(problem("--" + "x" * 10_000)) < 200


def help_of(command: str, monkeypatch, capsys) -> list[str]:
  """Return the lines of a command's help on a terminal of 100 columns."""
  monkeypatch.setenv("COLUMNS", "100")
  with pytest.raises(SystemExit) as caught:
    cli._COMMANDS[command](f"imdb-jax {command}", ["--help"])
  assert caught.value.code == 0
  return capsys.readouterr().out.splitlines()


def test_the_help_has_its_groups_in_order(monkeypatch, capsys):
  lines = help_of("train", monkeypatch, capsys)
  headings = [line[:-1] for line in lines if re.fullmatch(r"\S.*:", line)]
  assert headings == ["options", *GROUPS]
  common = lines[lines.index("common:") + 1 : lines.index("data:")]
  flags = [line.split()[0] for line in common if line.startswith("  -")]
  assert sorted(flags) == ["--archive", "--data", "--epochs", "--platform", "--preset", "--run-dir"]
  assert flags[0] == "--preset"


def test_the_help_lists_every_setting_with_its_default(monkeypatch, capsys):
  lines = help_of("train", monkeypatch, capsys)
  starts = {line.split()[0].rstrip(","): i for i, line in enumerate(lines) if line.startswith("  -")}
  for name, default in settings().items():
    # A long path is wrapped.
    entry = "".join("".join(lines[starts[flag(name)] : starts[flag(name)] + 4]).split())
    assert default in (None, False) or f"[{default}]" in entry


def test_the_defaults_shown_are_those_of_the_preset(capsys):
  with pytest.raises(SystemExit):
    parse("--preset", "fast", "--help")
  text = " ".join(capsys.readouterr().out.split())
  assert "--hidden-size N Number of recurrent units. [64]" in text


def test_the_help_has_four_examples_that_parse(monkeypatch, capsys):
  lines = help_of("train", monkeypatch, capsys)
  examples = [re.split(" {2,}", line.strip()) for line in lines[lines.index("examples:") + 1 :]]
  assert len(examples) == 4
  for command, explanation in examples:
    assert command.startswith("imdb-jax train ")
    assert explanation
    parse(*command.removeprefix("imdb-jax train ").split())


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_the_help_fits_a_terminal_with_two_lines_per_flag_at_most(command, monkeypatch, capsys):
  lines = help_of(command, monkeypatch, capsys)
  assert max(map(len, lines)) <= 100
  entry, num_lines = "", 0
  for line in [*lines[lines.index("options:") :], ""]:
    if line.startswith("   "):
      num_lines += 1
    else:
      assert num_lines <= 2, f"{entry} has {num_lines} lines of help"
      # A short flag is followed by its help in the same line.
      entry, num_lines = line, len(line) > 32 and line[31] == " "


def test_the_help_of_the_script_fits_too(monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "100")
  with pytest.raises(SystemExit):
    parse_config("python scripts/train.py", ["--help"])
  assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_tells_its_version(command, capsys):
  with pytest.raises(SystemExit) as caught:
    cli._COMMANDS[command](f"imdb-jax {command}", ["--version"])
  assert caught.value.code == 0
  assert capsys.readouterr().out == f"imdb_jax {importlib.metadata.version('imdb_jax')}\n"


@pytest.mark.parametrize("text", ["text", "", "-", "-1 of 10", "--- no stars", "a -- b"])
def test_texts_may_follow_flags(text):
  parser = arguments.Parser(prog="predict")
  parser.add_argument("run_dir")
  parser.add_argument("texts", nargs="*")
  parser.add_argument("--json", action="store_true")
  for args in (
    ["run", "--json", text],
    ["run", text, "--json"],
    ["--json", "run", text],
    ["--json", "run", "--", text],
  ):
    given = parser.parse_args(args)
    assert (given.run_dir, given.texts, given.json) == ("run", [text], True)
  for args in (["run", "--jsn", text], ["run", text, "--jsn"]):
    with pytest.raises(UsageError, match=r"^--jsn: unknown\. Did you mean --json\? See --help\.$"):
      parser.parse_args(args)
