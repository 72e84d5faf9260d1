"""`report`."""

import json
import re

import pytest
from running import TINY, assert_one_clear_line, copy_of

pytestmark = pytest.mark.slow


def test_the_report_of_a_run_shows_what_evaluate_answers(trained, tmp_path, call):
  run_dir = copy_of(trained, tmp_path)
  before = (run_dir / "report.html").read_text()
  # The texts are at hand only now.
  assert "Texts: not at hand" in before
  assert call("report", run_dir, "--platform", "cpu") == (0, f"{run_dir / 'report.html'}\n", "")
  after = (run_dir / "report.html").read_text()
  assert "Texts: not at hand" not in after
  # Words are coloured by the model, which training has not loaded.
  assert 'class="explained"' in after
  assert 'class="explained"' not in before
  _, stdout, _ = call("evaluate", run_dir, "--platform", "cpu", "--json")
  accuracy = json.loads(stdout)["accuracy"]
  for text in (before, after):
    assert f">{100 * accuracy:.2f}<small>" in text


def test_another_page_leaves_the_run_as_it_is(trained, tmp_path, call):
  run_dir, output = copy_of(trained, tmp_path), tmp_path / "page.html"
  before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
  assert call("report", run_dir, "--platform", "cpu", "--output", output)[:2] == (0, f"{output}\n")
  assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before
  assert "<h1>run" in output.read_text()


def test_several_runs_are_compared_with_the_first(trained, other_run, tmp_path, call):
  output = tmp_path / "page.html"
  assert call("report", trained, other_run, "--platform", "cpu", "--output", output) == (0, f"{output}\n", "")
  text = output.read_text()
  assert "vs run<" in text
  assert text.count("<svg") == 2
  accuracies = []
  for run_dir in (trained, other_run):
    _, stdout, _ = call("evaluate", run_dir, "--platform", "cpu", "--json")
    accuracies.append(100 * json.loads(stdout)["accuracy"])
  cells = re.findall("<td>([^<]*)</td>", text)
  assert [f"{accuracy:.2f}" for accuracy in accuracies] == [cells[2], cells[len(cells) // 2 + 2]]
  assert f"{accuracies[1] - accuracies[0]:+.1f} [" in cells[len(cells) // 2 + 3]


def test_the_comparison_names_the_step_of_each_run(trained, other_run, tmp_path, call):
  flags = ("--platform", "cpu", "--step", "latest")
  assert call("report", trained, other_run, *flags, "--output", tmp_path / "page.html")[0] == 0
  runs = (trained, other_run)
  last = [json.loads(call("evaluate", run_dir, *flags, "--json")[1])["step"] for run_dir in runs]
  named = ", ".join(f"{run_dir.name}: {step:,}" for run_dir, step in zip(runs, last, strict=True))
  assert f"answered by these steps of the runs: {named}." in (tmp_path / "page.html").read_text()


def test_an_unwritable_output_is_one_line(trained, other_run, tmp_path, call):
  output = tmp_path / "absent" / "page.html"
  for runs in ((trained,), (trained, other_run)):
    result = call("report", *runs, "--platform", "cpu", "--output", output)
    assert_one_clear_line(result, 2, f"{output}: cannot be written")


def test_what_is_not_a_run_is_one_line(trained, tmp_path, call):
  assert_one_clear_line(call("report", tmp_path), 2, "not a run directory")
  (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
  assert_one_clear_line(call("report", tmp_path), 2, "provenance.json")


def test_reviews_that_are_gone_are_left_out(tmp_path, call):
  data, run_dir = tmp_path / "reviews.csv", tmp_path / "run"
  data.write_text("text,label\n" + "".join(f"film {n} was {('bad', 'good')[n % 2]},{n % 2}\n" for n in range(60)))
  flags = [value for value in TINY if value not in ("--data", "sample")]
  assert call("train", "--data", data, "--cache-dir", tmp_path / "cache", *flags, "--run-dir", run_dir)[0] == 0
  data.unlink()
  cache = ("--cache-dir", tmp_path / "cache", "--platform", "cpu")
  code, _, _ = call("report", run_dir, *cache)
  assert code == 0
  assert "All that depends on reviews: " in (run_dir / "report.html").read_text()
  assert_one_clear_line(call("report", run_dir, run_dir, *cache), 3, str(run_dir), "All that depends on reviews")


@pytest.mark.parametrize("split", ["validation", "train"])
def test_other_splits(split, trained, tmp_path, call):
  output = tmp_path / "page.html"
  assert call("report", trained, "--platform", "cpu", "--output", output, "--split", split)[0] == 0
  assert {"validation": "test reviews", "train": "training reviews"}[split] in output.read_text()
