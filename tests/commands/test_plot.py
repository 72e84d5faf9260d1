"""`plot`."""

import json
import os

import pytest
from running import assert_one_clear_line, copy_of, history


def test_the_figure_is_written_to_the_output(trained, tmp_path, call):
  output = tmp_path / "curves.png"
  assert call("plot", trained, "--output", output) == (0, f"{output}\n", "")
  assert output.read_bytes().startswith(b"\x89PNG")


def test_an_output_that_cannot_be_written(trained, tmp_path, call):
  (tmp_path / "folder.png").mkdir()
  for output in (tmp_path / "absent" / "curves.png", tmp_path / "folder.png"):
    assert_one_clear_line(call("plot", trained, "--output", output), 2, f"--output {output}: cannot be written")


def test_what_is_not_a_run(tmp_path, call):
  (tmp_path / "file").touch()
  for path, reason in (("", "not a run directory"), ("none", "not a run directory"), ("file", "Not a directory")):
    assert_one_clear_line(call("plot", tmp_path / path), 2, str(tmp_path / path), reason)


def test_a_run_in_its_first_epoch(trained, tmp_path, call):
  (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
  assert_one_clear_line(call("plot", tmp_path), 2, "no epoch has been finished yet")


def test_a_figure_that_is_a_hard_link_is_replaced(trained, tmp_path, call):
  copy, outside = copy_of(trained, tmp_path), tmp_path / "outside"
  outside.write_text("dear")
  (copy / "history.png").unlink()
  (copy / "history.png").hardlink_to(outside)
  assert call("plot", copy) == (0, f"{copy / 'history.png'}\n", "")
  assert outside.read_text() == "dear"


@pytest.mark.parametrize("name", ["metrics.jsonl", "history.csv", "history.png", "report.html", "report.md"])
@pytest.mark.parametrize("target", [None, "/dev/zero", "/etc/passwd", "outside"])
def test_pipes_and_links_are_refused_before_anything_is_read(name, target, trained, tmp_path, call):
  (tmp_path / "outside").write_text("dear")
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_bytes((trained / "config.json").read_bytes())
  if target is None:
    os.mkfifo(tmp_path / "run" / name)
  else:
    (tmp_path / "run" / name).symlink_to(tmp_path / target)
  assert_one_clear_line(call("plot", tmp_path / "run"), 2, f"holds links or devices ({name})")
  assert (tmp_path / "outside").read_text() == "dear"


@pytest.mark.parametrize("value", [1e308, -1e308, 10**400, -1e39])
@pytest.mark.parametrize("field", ["loss", "val_accuracy"])
def test_values_that_no_run_writes_are_refused(value, field, trained, tmp_path, call):
  (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
  line = next(line for line in history(trained) if line["kind"] == "epoch")
  text = json.dumps(line | {"seconds": 1.0, "evaluation_seconds": 1.0, field: value})
  (tmp_path / "metrics.jsonl").write_text(text + "\n")
  assert_one_clear_line(call("plot", tmp_path), 2, "metrics.jsonl: not readable", "not a line of metrics")


def test_damaged_metrics(trained, tmp_path, call):
  (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
  (tmp_path / "metrics.jsonl").write_text('{"kind": "epoch", "step": 4, "epoch": 1, "loss": "good"}\n')
  assert_one_clear_line(call("plot", tmp_path), 2, "metrics.jsonl: not readable")
