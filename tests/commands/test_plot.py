"""`plot`."""

from running import assert_one_clear_line


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


def test_damaged_metrics(trained, tmp_path, call):
  (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
  (tmp_path / "metrics.jsonl").write_text('{"kind": "epoch", "step": 4, "epoch": 1, "loss": "good"}\n')
  assert_one_clear_line(call("plot", tmp_path), 2, "metrics.jsonl: not readable")
