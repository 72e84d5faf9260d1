"""The page about a run: what it shows, and what it leaves out of a run that has little to show."""

import dataclasses
import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest

from imdb_jax.config import Config, RuntimeConfig
from imdb_jax.data.reviews import Reviews
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.errors import UsageError
from imdb_jax.presets import PRESETS
from imdb_jax.report import page
from imdb_jax.report.page import Answers
from imdb_jax.store import run_directory
from imdb_jax.task import Classification

VOCABULARY = Vocabulary(config=PRESETS["sample"].data, words=("good", "bad"))
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


def run_of(folder: Path, *epochs: tuple[float, ...], preset: str = "sample", classes: int = 2) -> Config:
  """Return the config of a run with these METRICS after each epoch."""
  config = Config.from_dict(PRESETS[preset].to_dict(), RuntimeConfig(run_dir=folder / "run"))
  (folder / "run").mkdir()
  facts = {"digest": "digest", "summary": "4 train", "counts": {f"class {number}": 1 for number in range(classes)}}
  run_directory.create(config, types.SimpleNamespace(**facts, vocabulary=VOCABULARY, left_out={}))
  if classes == 2:
    # As in older runs on IMDB.
    (folder / "run" / "classes.json").unlink()
  lines = []
  for number, values in enumerate(epochs, 1):
    seed = {"seed": 0, **dict(zip(METRICS, values, strict=True))}
    line = {"kind": "epoch", "epoch": number, "step": number, **seed, "seconds": 12.0, "evaluation_seconds": 3.0}
    del line["seed"]
    lines.append(json.dumps(line | {"seeds": [seed]}) + "\n")
  (folder / "run" / "metrics.jsonl").write_text("".join(lines))
  return config


def answers_of(logits: list, labels: list[int], texts: list[str] | None = None, **options) -> Answers:
  """Return answers of one seed. Each review has as many tokens as its place says."""
  n = len(labels)
  tokens = np.zeros((n, n), np.int16)
  for row in range(n):
    tokens[row, n - row :] = 1 + row % 2
  labels_ = np.array(labels, np.int32)
  encoded = TokenSplit(tokens=tokens, lengths=np.arange(n, dtype=np.int32), labels=labels_)
  reviews = Reviews(texts=tuple(texts), labels=labels_, stars=options.pop("stars", None)) if texts is not None else None
  array = np.array(logits, np.float32).reshape(1, n, -1)
  known = {"step": 1, "split": "test", "temperature": 1.0} | options
  return Answers(encoded=encoded, logits=array, vocabulary=VOCABULARY, reviews=reviews, **known)


def text_of(html: str) -> str:
  """Return what a page shows, without figures and tags."""
  html = re.sub(r"<(svg|style).*?</\1>", "", html, flags=re.DOTALL)
  return " ".join(re.sub("<[^>]*>", " ", html).split())


def written(config: Config, answers: Answers | None, classes: tuple[str, ...] = ("negative", "positive")) -> str:
  return text_of(page.write(config, Classification(classes), answers).read_text())


GOOD = (0.5, 0.5, 0.5, 0.5)


def test_the_headline_has_accuracy_interval_and_number_of_reviews(tmp_path):
  labels = [0, 1] * 50
  logits = [2.0 if label else -2.0 for label in labels]
  logits[:10] = [-each for each in logits[:10]]
  shown = written(run_of(tmp_path, GOOD), answers_of(logits, labels))
  low, high = Classification().evaluate(np.array(logits)[None, :, None], np.array(labels)).accuracy_interval
  assert "90.00 %" in shown
  assert f"Accuracy on 100 test reviews , 95% interval {100 * low:.2f}% to {100 * high:.2f}%." in shown
  assert "Training 12 s" in shown


def test_the_page_says_which_step_answered(tmp_path):
  """Epoch 2 is the best; its step is 2."""
  config, answers = run_of(tmp_path, GOOD, (0.5, 0.5, 0.5, 0.75), GOOD), answers_of([1, -1], [1, 0])
  best, latest = (written(config, dataclasses.replace(answers, step=step)) for step in (2, 3))
  assert "This is what Classifier answers with: epoch 2, chosen on" in best
  assert "These are the answers of step 3; by default, Classifier answers with epoch 2, step 2." in latest
  assert "This is what" not in latest
  assert "On 2 test reviews, after step 3: accuracy 1.0000" in (config.run_dir / "report.md").read_text()


def test_the_confusion_matrix_has_a_row_per_label(tmp_path):
  shown = written(run_of(tmp_path, GOOD), answers_of([-1, -1, 1, 1, 1], [0, 0, 0, 1, 1]))
  assert "negative positive negative 2 66.7% 1 33.3% positive 0 0.0% 2 100.0%" in shown


def test_mistakes_come_with_the_most_confident_first(tmp_path):
  texts = ["fine", "sure & wrong <b>", "unsure", "wrong"]
  shown = written(run_of(tmp_path, GOOD), answers_of([3, 4, 0.1, -1], [1, 0, 1, 1], texts))
  _, mistakes, unsure = re.split("Where it is most surely wrong|Where it is least certain", shown)
  first = "answer: positive, 98.20% label: negative review 1 sure &amp; wrong &lt;b&gt;"
  second = "answer: negative, 73.11% label: positive review 3 wrong"
  assert mistakes.strip().endswith(f"{first} {second}")
  assert re.findall("review ([0-9])", unsure) == ["2", "3", "0", "1"]


def test_what_is_not_at_hand_is_said(tmp_path):
  shown = written(run_of(tmp_path, GOOD), answers_of([1, -1, 1], [1, 0, 0]))
  assert "Texts: not at hand here" in shown
  # The words that the model reads.
  assert "review 2 good good" in shown


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_calibration_error_is_given_before_and_after_temperature(temperature, tmp_path):
  answers = answers_of([4, -4, 4, -4], [1, 0, 0, 1], temperature=temperature)
  shown = written(run_of(tmp_path, GOOD), answers)
  # Half of the answers are right, with a confidence of sigmoid(4 / temperature).
  after, before = (100 / (1 + math.exp(-4 / each)) - 50 for each in (temperature, 1))
  expected = f"Calibration error {after:.2f}%" + (f", before temperature {before:.2f}%" if temperature != 1 else "")
  assert f"{expected}." in shown


def test_imdb_is_compared_with_the_article_and_a_linear_model(tmp_path):
  config = run_of(tmp_path, *[GOOD] * 2, preset="article")
  answers = answers_of([1, -1, 1, -1], [1, 0, 0, 1], ["a", "b", "c", "d"], stars=np.array([10, 1, 3, 8]))
  text = page.write(config, Classification(), answers).read_text()
  assert "Linear model (NB-SVM) 91.47%" in text_of(text)
  assert "The article (Keras LSTM) 88.32%" in text_of(text)
  assert "article, test" in text
  assert "Accuracy by stars" in text
  for held_out in (answers_of([1, -1], [1, 0], split="validation"), answers_of([1, -1], [1, 0], split="train")):
    assert "91.47%" not in written(config, held_out)


@pytest.mark.parametrize(
  "epochs", [[], [GOOD], [(math.nan, 0.5, math.inf, 0.5), GOOD], [(math.nan, 0.5, math.nan, 0.5)]]
)
@pytest.mark.parametrize("num_reviews", [0, 1, 2])
@pytest.mark.filterwarnings("error")
def test_runs_with_little_to_show(epochs, num_reviews, tmp_path):
  answers = answers_of([1.0, -1.0][:num_reviews], [0, 0][:num_reviews]) if num_reviews else None
  shown = written(run_of(tmp_path, *epochs), answers)
  if not epochs:
    assert "Curves by epoch" in shown
  if answers:
    assert "ROC and precision–recall curves: they need two classes, with reviews of both." in shown
  else:
    assert "Where it is most surely wrong" not in shown


def test_three_classes(tmp_path):
  classes = ("one", "t<wo", "three $x_{")
  logits = [[2, 1, 0], [2, 1, 0], [0, 0, 5]]
  config = run_of(tmp_path, GOOD, classes=3)
  shown = written(config, answers_of(logits, [0, 1, 2]), classes)
  assert "one 1 100.0% 0 0.0% 0 0.0% t&lt;wo 1 100.0% 0 0.0% 0 0.0% three $x_{ 0 0.0% 0 0.0% 1 100.0%" in shown
  assert "t&lt;wo 0.0000 0.0000 0.0000 1" in shown


def test_odd_texts_are_short_and_cannot_change_the_page(tmp_path):
  texts = ["long " * 200_000, "\x1b[31m\udcff</div><script>alert(1)</script>", ""]
  path = page.write(run_of(tmp_path, GOOD), Classification(), answers_of([1, 1, 1], [0, 0, 0], texts))
  text = path.read_text()
  assert len(text) < 500_000
  assert "<script" not in text
  assert "\x1b" not in text
  assert "(no known word)" in text_of(text)


def test_coloured_words_are_shown_as_they_are(tmp_path):
  answers = answers_of([1], [0], ["bad"], explain=lambda texts: [f"<p><i>{text}</i></p>" for text in texts])
  assert "<p><i>bad</i></p>" in page.write(run_of(tmp_path, GOOD), Classification(), answers).read_text()


def test_the_page_needs_no_other_file(tmp_path):
  text = page.write(run_of(tmp_path, GOOD), Classification(), answers_of([1, -1], [1, 0])).read_text()
  assert not re.findall(r"(?:src|href)=\"(?!data:,|#)[^\"]*", text.replace('xlink:href="#', 'xlink:href="#'))
  assert "url(http" not in text
  assert "<script" not in text


def test_the_command_repeats_the_settings_that_differ(tmp_path):
  import dataclasses

  from imdb_jax import arguments

  config = run_of(tmp_path, GOOD)
  model = dataclasses.replace(config.model, hidden_size=8, mask_padding=True)
  data = dataclasses.replace(config.data, strip_html=False)
  config = dataclasses.replace(config, model=model, data=data)
  shown = written(config, None)
  command = re.search(r"To repeat it: (imdb-jax train .*?) To use it", shown)
  assert command is not None
  repeated = arguments.parse_config("imdb-jax train", command[1].split()[2:])
  assert repeated.settings() == config.settings()
  assert "model.hidden_size: 64 -&gt; 8" in shown


def test_resumes_and_versions_of_a_stranger_are_only_text(tmp_path):
  config = run_of(tmp_path, GOOD)
  path = config.run_dir / "provenance.json"
  starts = [{"step": 0}, {"step": "<b>" * 99, "devices": ["<i>"], "versions": {"jax": {"<u>": 1}}}]
  path.write_text(json.dumps(json.loads(path.read_text()) | {"starts": starts, "data": {"<s>": 1}}))
  shown = written(config, None)
  assert "&lt;i&gt;" in shown
  for starts in ([], [{"versions": "none"}]):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"starts": starts}))
    assert "Versions unknown" in written(config, None)


def test_an_output_that_cannot_be_written_is_named(tmp_path):
  config = run_of(tmp_path, GOOD)
  output = tmp_path / "absent" / "page.html"
  with pytest.raises(UsageError, match=rf"{output}: cannot be written"):
    page.write(config, Classification(), None, output=output)


def test_figures_are_also_files(tmp_path):
  folder = tmp_path / "figures"
  folder.mkdir()
  page.write(run_of(tmp_path, GOOD), Classification(), answers_of([1, -1], [1, 0]), figures_dir=folder)
  names = {path.name for path in folder.iterdir()}
  assert {
    f"{name}.{suffix}" for name in ("accuracy", "loss", "roc", "reliability") for suffix in ("png", "svg")
  } < names


def test_a_notebook_shows_table_and_curves(tmp_path):
  text = page.notebook(run_of(tmp_path, GOOD, (0.1, 0.9, 0.2, 0.75)).run_dir)
  assert text.count("<svg") == 1
  assert "2 0.1000 0.9000 0.2000 0.7500 12.0" in text_of(text)
