"""`explain`: contributions in the terminal, as JSON and as a page."""

import json

import pytest
from running import assert_one_clear_line

from imdb_jax import Classifier

TEXT = "A good <b>film</b> zzzz & bad"


def test_contributions_are_those_of_the_classifier(trained, call):
  (expected,) = Classifier.load(trained).explain([TEXT])
  code, stdout, stderr = call("explain", trained, TEXT, "--json", "--platform", "cpu")
  assert (code, stderr) == (0, "")
  found = json.loads(stdout)
  assert list(found) == ["text", "label", "logit", "baseline_logit", "words", "error", "change"]
  assert (found["text"], found["label"]) == (TEXT, "positive")
  assert found["logit"] == pytest.approx(expected.logit, abs=1e-6)
  for word in found["words"]:
    assert TEXT[word["start"] : word["end"]] == word["text"]
  values = [word["contribution"] for word in found["words"] if word["contribution"] is not None]
  assert sum(values) == pytest.approx(found["logit"] - found["baseline_logit"], abs=1e-3)
  unseen = {word["text"] for word in found["words"] if word["contribution"] is None}
  assert {"<b>", "</b>", "zzzz"} <= unseen


def test_the_terminal_shows_the_text_and_the_main_words(trained, call):
  code, stdout, stderr = call("explain", trained, TEXT, "bad\nfilm \x1b[2J", "--class", "negative", "--platform", "cpu")
  assert (code, stderr) == (0, "")
  lines = stdout.splitlines()
  assert lines[0].startswith("negative: logit ")
  assert "of 7 words and tags not seen" in lines[0]
  assert lines[1] == TEXT
  assert "\x1b" not in stdout, "neither colors, as this is no terminal, nor those of the text"
  assert "bad film  [2J" in lines


def test_the_page_holds_the_texts_and_nothing_of_other_hosts(trained, tmp_path, call):
  texts = ("A good film", "<script>alert(1)</script> bad \udcff")
  code, stdout, _ = call("explain", trained, *texts, "--html", tmp_path / "page.html", "--platform", "cpu")
  assert code == 0
  assert "A good film" in stdout.splitlines()
  page = (tmp_path / "page.html").read_text("utf-8")
  assert page.count('<p class="explained"') == page.count("<h2>positive: logit ") == 2
  assert "&lt;script&gt;" in page
  assert not any(each in page for each in ("<script", "http:", "https:", "url("))


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("bad", "--class", "better"), "'better': is no class; there are negative, positive"),
    (("bad", "--html", "/proc/none/page.html"), "--html /proc/none/page.html: No such file or directory"),
    ((), "TEXT"),
    (("bad", "--with", "run"), "--with: unknown"),
  ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(trained, arguments, words, call):
  assert_one_clear_line(call("explain", trained, *arguments, "--platform", "cpu"), 2, words)
