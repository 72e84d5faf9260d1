"""Predictions from files that other programs or people have changed."""

import hashlib
import json
from pathlib import Path

import pytest
from running import assert_one_clear_line, copy_of


def with_vocabulary(trained: Path, folder: Path, **changes) -> Path:
  """Return a copy of a run with another vocabulary, whose recorded digest agrees."""
  run_dir = copy_of(trained, folder)
  fields = json.loads((run_dir / "vocab.json").read_text()) | changes
  content = json.dumps(fields).encode()
  (run_dir / "vocab.json").write_bytes(content)
  provenance = json.loads((run_dir / "provenance.json").read_text())
  provenance["vocabulary_sha256"] = hashlib.sha256(content).hexdigest()
  (run_dir / "provenance.json").write_text(json.dumps(provenance))
  return run_dir


@pytest.mark.parametrize(
  "changes",
  [
    {"size": 200_001, "words": [str(number) for number in range(200_000)]},
    {"words": [str(number) for number in range(200)]},
    {"strip_html": False},
    {"words": ["a", "\ud800"]},
  ],
  ids=["larger", "as many words as ids", "with tags", "half of a surrogate pair"],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_vocabulary_that_does_not_fit_the_model_is_refused(trained, tmp_path, call, command, changes):
  """Its ids would lie outside the embedding, which gives NaN."""
  run_dir = with_vocabulary(trained, tmp_path, **changes)
  texts = ["a good film"] if command == "predict" else []
  assert_one_clear_line(call(command, run_dir, "--platform", "cpu", *texts), 2, "vocab.json: not a usable vocabulary")


def test_a_byte_order_mark_changes_no_answer(trained, tmp_path, call):
  """Editors write it at the start of a file."""
  answers = []
  for mark in ("", "\ufeff"):
    (tmp_path / "reviews.txt").write_text(f"{mark}Film after film.\nGood film.\n", encoding="utf-8")
    code, stdout, _ = call("predict", trained, "--platform", "cpu", "--json", "--file", tmp_path / "reviews.txt")
    assert code == 0
    answers.append([{**json.loads(line), "text": None} for line in stdout.splitlines()])
  assert answers[0] == answers[1]
  assert answers[0][0]["known_words"] == 3
