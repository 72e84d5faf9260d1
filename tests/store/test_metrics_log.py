"""Lines of metrics are read however many there are, and a resumed run continues after its checkpoint."""

import csv
import itertools
import json
import math
import os
import struct
from pathlib import Path

import pytest
from training.tiny import tiny

from imdb_jax.config import Config, RuntimeConfig
from imdb_jax.errors import CheckpointError, UsageError
from imdb_jax.store import files, metrics_log, run_directory
from imdb_jax.store.metrics_log import MetricsLog


def configure(run_dir: Path, **training) -> Config:
  """Write the settings of a run of two epochs and one seed, unless others are given."""
  config = tiny(run_dir, **training)
  files.write_json(run_dir / "config.json", config.to_dict())
  return config


@pytest.fixture(autouse=True)
def config(tmp_path) -> Config:
  return configure(tmp_path)


def step_line(step: int, **others) -> dict:
  return {"kind": "step", "epoch": 1, "step": step, "loss": 0.5, "accuracy": 0.75} | others


def epoch_line(epoch: int, num_seeds: int = 1) -> dict:
  """Return the line of an epoch of four steps, in which a seed's metrics grow with the seed."""
  seeds = [{"seed": seed, **dict.fromkeys(metrics_log.METRICS, (seed + 1) * epoch / 1024)} for seed in range(num_seeds)]
  means = dict.fromkeys(metrics_log.METRICS, 0.5)
  times = {"seconds": 1.5, "evaluation_seconds": 0.25}
  return {"kind": "epoch", "epoch": epoch, "step": 4 * epoch, **means, **times, "seeds": seeds}


# Two epochs of four steps, with a line every two steps.
LINES = [line for epoch in (1, 2) for line in (step_line(4 * epoch - 2), step_line(4 * epoch), epoch_line(epoch))]


def write(run_dir: Path, lines: list, end: str = "") -> str:
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (run_dir / "metrics.jsonl").write_text(text + end)
  return text


def resume(run_dir: Path, step: int, num_epochs: int, is_writer: bool = True) -> MetricsLog:
  config = run_directory.load_config(run_dir, RuntimeConfig(run_dir=run_dir))
  return MetricsLog(config, step=step, num_epochs=num_epochs, held={} if is_writer else None)


def test_a_new_run_writes_its_lines_at_once(tmp_path):
  log = resume(tmp_path, 0, 0)
  for line in LINES:
    log.write(line)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == line
  log.sync()
  log.close()
  assert log.history == metrics_log.read(tmp_path)[0] == [epoch_line(1), epoch_line(2)]


def test_without_a_file_there_is_no_history(tmp_path):
  assert metrics_log.read(tmp_path)[0] == []


@pytest.mark.parametrize(
  ("step", "num_epochs", "num_kept"),
  [(0, 0, 0), (2, 0, 1), (3, 0, 1), (4, 0, 2), (4, 1, 3), (6, 1, 4), (8, 1, 5), (8, 2, 6)],
)
@pytest.mark.parametrize("end", ["", '{"kind": "st'])
def test_lines_after_the_checkpoint_are_dropped(step, num_epochs, num_kept, end, tmp_path):
  write(tmp_path, LINES, end)
  log = resume(tmp_path, step, num_epochs)
  assert log.history == [epoch_line(epoch) for epoch in range(1, num_epochs + 1)]
  log.write(step_line(step + 1))
  log.close()
  kept = [*LINES[:num_kept], step_line(step + 1)]
  assert list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())) == kept


def test_only_the_writer_changes_the_file(tmp_path):
  text = write(tmp_path, LINES)
  log = resume(tmp_path, 4, 1, is_writer=False)
  log.write(epoch_line(2))
  log.sync()
  log.close()
  assert log.history == [epoch_line(1), epoch_line(2)]
  assert (tmp_path / "metrics.jsonl").read_text() == text


def remove_all(path: Path) -> None:
  for each in path.parent.iterdir():
    each.unlink()
  path.parent.rmdir()


def replace(path: Path) -> None:
  path.with_name("copy").write_bytes(path.read_bytes())
  path.with_name("copy").replace(path)


@pytest.mark.parametrize("change", [Path.unlink, replace, remove_all], ids=["removed", "replaced", "all removed"])
def test_a_log_that_has_gone_is_noticed_before_a_save(change, config, tmp_path):
  log = resume(tmp_path, 0, 0)
  log.write(step_line(1))
  log.sync()
  change(tmp_path / "metrics.jsonl")
  with pytest.raises(UsageError, match=r"metrics\.jsonl: was moved, removed or replaced during training") as caught:
    log.sync()
  assert len(str(caught.value).splitlines()) == 1
  log.close()


def test_a_log_that_lacks_epochs_is_refused_and_kept(tmp_path):
  text = write(tmp_path, LINES[:3])
  with pytest.raises(CheckpointError, match="holds 1 of the 2 epochs before step 8"):
    resume(tmp_path, 8, 2)
  assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_last_line_that_a_crash_cut_off_is_ignored(tmp_path):
  for end in ('{"kind": "epo', json.dumps(epoch_line(2))):
    write(tmp_path, LINES[:3], end)
    assert metrics_log.read(tmp_path)[0] == [epoch_line(1)]


@pytest.mark.parametrize(
  "line",
  [
    None,
    [],
    {},
    {"kind": "epoch"},
    step_line(1) | {"step": "1"},
    step_line(1) | {"step": True},
    step_line(1) | {"step": -1},
    step_line(1) | {"step": 10**400},
    step_line(1) | {"step": 1.5},
    step_line(1) | {"accuracy": 1.01},
    step_line(1) | {"more": 1.0},
    {name: value for name, value in step_line(1).items() if name != "loss"},
    epoch_line(2),
    epoch_line(1, num_seeds=2),
    epoch_line(1) | {"loss": None},
    epoch_line(1) | {"loss": -0.5},
    epoch_line(1) | {"val_loss": 1e308},
    epoch_line(1) | {"val_loss": -math.inf},
    epoch_line(1) | {"val_accuracy": math.nan},
    epoch_line(1) | {"val_accuracy": math.inf},
    epoch_line(1) | {"step": math.nan},
    epoch_line(1) | {"seconds": 10**400},
    epoch_line(1) | {"more": 1.0},
    epoch_line(1) | {"seconds": "1"},
    epoch_line(1) | {"seeds": []},
    epoch_line(1) | {"seeds": {}},
    epoch_line(1) | {"seeds": 7},
    epoch_line(1) | {"seeds": [{"seed": 0}]},
    epoch_line(1) | {"seeds": [epoch_line(1)["seeds"][0] | {"seed": 1}]},
    epoch_line(1) | {"seeds": [epoch_line(1)["seeds"][0] | {"val_accuracy": math.nan}]},
  ],
)
def test_lines_of_another_form_are_refused(line, tmp_path):
  text = write(tmp_path, [step_line(1), line])
  for use in (metrics_log.read, lambda run_dir: resume(run_dir, 8, 2)):
    with pytest.raises(UsageError, match=r"metrics\.jsonl: not readable: line ending at byte [\d,]+: ") as caught:
      use(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
  assert (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("odd", [{"loss": math.nan, "accuracy": math.nan}, {"val_loss": math.inf}, {"val_loss": 3e38}])
def test_what_a_run_that_nearly_diverges_writes_is_read(odd, tmp_path):
  """imdb_jax 0.4 could skip steps: an epoch of it may have none that counts."""
  line = epoch_line(1) | odd
  line["seeds"] = [line["seeds"][0] | odd]
  log = resume(tmp_path, 0, 0)
  log.write(line)
  log.close()
  for history in (metrics_log.read(tmp_path)[0], resume(tmp_path, 4, 1, is_writer=False).history):
    # NaN differs from itself.
    assert repr(history) == repr([line])


def test_a_log_holds_no_more_epochs_than_the_run_has(tmp_path):
  """Else its lines, which are kept in memory, might be a gigabyte."""
  write(tmp_path, [epoch_line(epoch) for epoch in (1, 2, 3)])
  with pytest.raises(UsageError, match=r"metrics\.jsonl: not readable: .*not epoch 3 of 2"):
    metrics_log.read(tmp_path)[0]


@pytest.mark.parametrize("text", ["{" * 10**5, "[" * 10**5, "", "\0", "\ufeff{}"])
def test_lines_that_are_not_json_are_refused(text, tmp_path):
  (tmp_path / "metrics.jsonl").write_text(text + "\n", encoding="utf-8")
  with pytest.raises(UsageError, match=r"metrics\.jsonl: not readable"):
    metrics_log.read(tmp_path)[0]


def test_bytes_that_are_not_utf_8_are_refused(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "step", "step": 1, "a": "\xff"}\n')
  with pytest.raises(UsageError, match=r"metrics\.jsonl: not readable"):
    metrics_log.read(tmp_path)[0]


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path.parent / "elsewhere"), os.mkfifo])
def test_only_a_regular_file_is_read(make, config, tmp_path):
  (tmp_path / "elsewhere").touch()
  make(tmp_path / "metrics.jsonl")
  with pytest.raises(UsageError, match=r"metrics\.jsonl: not readable|holds links or devices \(metrics\.jsonl\)"):
    metrics_log.read(tmp_path)[0]
  with pytest.raises(UsageError, match=r"metrics\.jsonl: not readable"):
    MetricsLog(config, step=0, num_epochs=0, held={})


def test_a_log_of_any_size_is_read_and_continued(tmp_path):
  """Version 0.1 refused to resume a run whose metrics had grown beyond 256 MiB."""
  path = tmp_path / "metrics.jsonl"
  padded = json.dumps(step_line(1)).ljust(1_000_000) + "\n"
  try:
    with path.open("w") as file:
      for _ in range(270):
        file.write(padded)
      file.write(json.dumps(epoch_line(1)) + "\n")
    size = path.stat().st_size
    assert size > 2**28
    assert metrics_log.read(tmp_path)[0] == [epoch_line(1)]
    log = resume(tmp_path, 4, 1)
    log.write(step_line(5))
    log.close()
    assert path.stat().st_size == size + len(json.dumps(step_line(5))) + 1
  finally:
    # pytest keeps temporary folders.
    path.unlink()


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_that_is_too_long_is_refused(end, tmp_path):
  line = json.dumps(step_line(1))
  path = tmp_path / "metrics.jsonl"
  path.write_text(line.ljust(2**20 - 1) + "\n")
  assert metrics_log.read(tmp_path)[0] == []
  path.write_text(line.ljust(2**20) + end)
  for use in (metrics_log.read, lambda run_dir: resume(run_dir, 1, 0)):
    with pytest.raises(UsageError, match=r"metrics\.jsonl: .*a line of more than 1,048,576 bytes"):
      use(tmp_path)


def test_an_epoch_of_the_most_seeds_fits_a_line(tmp_path):
  configure(tmp_path, num_seeds=1024, seed=2**31 - 1024)
  line = epoch_line(1, num_seeds=1024)
  for seed in line["seeds"]:
    seed |= dict.fromkeys(metrics_log.METRICS, 1.2345678901234567e-100) | {"seed": 2**31 - 1024 + seed["seed"]}
  log = resume(tmp_path, 0, 0)
  log.write(line)
  log.close()
  assert metrics_log.read(tmp_path)[0] == [line]


def test_history_csv_is_replaced_and_not_written_through_a_hard_link(tmp_path):
  outside = tmp_path / "outside"
  outside.write_text("dear")
  (tmp_path / "history.csv").hardlink_to(outside)
  metrics_log.write_csv(tmp_path, [epoch_line(1)])
  assert outside.read_text() == "dear"
  assert (tmp_path / "history.csv").read_text().startswith("epoch,")


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_history_csv_has_a_row_per_epoch_with_the_range_of_the_seeds(num_seeds, tmp_path):
  metrics_log.write_csv(tmp_path, [epoch_line(1, num_seeds), epoch_line(2, num_seeds)])
  with (tmp_path / "history.csv").open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [(row["epoch"], row["step"], row["loss"], row["seconds"]) for row in rows] == [
    ("1", "4", "0.5", "1.5"),
    ("2", "8", "0.5", "1.5"),
  ]
  for epoch, row in enumerate(rows, start=1):
    assert list(row) == [
      *metrics_log.EPOCH_FIELDS,
      *(f"{name}_{end}" for name in metrics_log.METRICS for end in ("min", "max")),
    ]
    for name in metrics_log.METRICS:
      assert (float(row[f"{name}_min"]), float(row[f"{name}_max"])) == (epoch / 1024, num_seeds * epoch / 1024)


MORE = {"time": 1.7e9, "learning_rate": 0.001, "grad_norm": 0.5, "reviews_per_second": 1000.0}


def test_lines_of_steps_may_have_more_numbers_all_or_none(tmp_path):
  lines = [step_line(1), step_line(2) | MORE, step_line(3) | MORE | {"grad_norm": math.nan}]
  write(tmp_path, lines)
  assert [line["step"] for line in metrics_log.read(tmp_path)[1]] == [1, 2, 3]
  for bad in ({"time": 1.7e9}, MORE | {"learning_rate": "fast"}, MORE | {"grad_norm": -1.0}):
    write(tmp_path, [step_line(1) | bad])
    with pytest.raises(UsageError, match="not a line of metrics"):
      metrics_log.read(tmp_path)


def test_many_lines_of_steps_are_thinned_evenly(tmp_path):
  write(tmp_path, [step_line(step) for step in range(1, 3 * metrics_log.MAX_STEP_LINES)])
  steps = [line["step"] for line in metrics_log.read(tmp_path)[1]]
  assert metrics_log.MAX_STEP_LINES / 2 < len(steps) <= metrics_log.MAX_STEP_LINES
  assert {later - step for step, later in itertools.pairwise(steps)} == {4}


def test_tensorboard_gets_the_same_numbers(tmp_path):
  tensorboard = pytest.importorskip("tensorboardX")
  from tensorboardX.proto.event_pb2 import Event

  config = run_directory.load_config(tmp_path, RuntimeConfig(run_dir=tmp_path, tensorboard=True))
  log = MetricsLog(config, step=0, num_epochs=0, held={})
  log.write(step_line(2) | MORE)
  log.write(epoch_line(1))
  log.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  found, content = {}, path.read_bytes()
  while content:
    # A record: length, its checksum, the content, its checksum.
    (size,) = struct.unpack("<Q", content[:8])
    event = Event.FromString(content[12 : 12 + size])
    found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    content = content[16 + size :]
  assert tensorboard is not None
  assert found["step/learning_rate", 2] == pytest.approx(0.001)
  assert found["step/loss", 2] == pytest.approx(step_line(2)["loss"])
  assert found["epoch/val_accuracy", 4] == pytest.approx(epoch_line(1)["val_accuracy"])
  assert not any(tag.endswith(("/seeds", "/kind")) for tag, _ in found)
