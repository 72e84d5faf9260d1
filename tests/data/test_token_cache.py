"""The cache of token arrays: it returns what it should, never anything stale, and fills only once."""

import dataclasses
import json
import subprocess
import sys
import threading

import filelock
import pytest
from data.corpus import CONFIG, HELD_OUT, Corpus, assert_same, entry_of, load

from imdb_jax.data import sources, tokens
from imdb_jax.errors import DataError


def test_sample_is_not_cached(cache_dir):
  config = dataclasses.replace(CONFIG, source="sample")
  lines = []
  source = sources.find(config, None, cache_dir)
  data = tokens.load(source, config, cache_dir=cache_dir, report=lines.append)
  assert (len(data.train), len(data.test)) == (4000, 1000)
  assert not cache_dir.exists()
  assert not lines


@pytest.mark.parametrize("config", [CONFIG, HELD_OUT], ids=["test", "split"])
def test_second_load_does_not_read_the_source(corpus, cache_dir, config):
  first, first_lines = load(corpus, cache_dir, config)
  second, second_lines = load(corpus, cache_dir, config)
  assert corpus.num_loads == 1
  assert_same(first, second)
  assert_same(first, tokens.encode(config, corpus.splits))
  assert "a corpus" in first_lines[0]
  assert not any("not the texts" in line for line in first_lines)
  assert not second_lines
  assert not [path for path in cache_dir.rglob("*") if path.name.startswith(".")], "a temporary file was left"


@pytest.mark.parametrize(
  "changes",
  [
    {"vocabulary_size": 10},
    {"sequence_length": 3},
    {"limit": 4},
    {"strip_html": False},
    {"punctuation": True},
    {"validation": "split"},
    {"validation_fraction": 0.2},
  ],
)
def test_other_settings_have_an_entry_of_their_own(corpus, cache_dir, changes):
  load(corpus, cache_dir)
  config = dataclasses.replace(CONFIG, **changes)
  data, _ = load(corpus, cache_dir, config)
  assert corpus.num_loads == 2
  assert_same(data, tokens.encode(config, corpus.splits))


def test_tokens_that_would_fill_the_memory_stay_in_the_file(corpus, cache_dir, monkeypatch):
  monkeypatch.setattr(tokens, "_MAX_MEMORY", 12 * CONFIG.sequence_length * 2 - 1)
  first, _ = load(corpus, cache_dir)
  assert_same(first, tokens.encode(CONFIG, corpus.splits))
  mapped = {name for name, array in first.arrays().items() if not array.flags.writeable}
  assert mapped == {f"{name}.tokens" for name in ("train", "validation", "test") if len(getattr(first, name)) >= 12}
  assert mapped


def test_changed_archive_is_read_again(corpus, cache_dir):
  before, _ = load(corpus, cache_dir)
  after, _ = load(Corpus("other archive", "dull"), cache_dir)
  assert "fine" in before.vocabulary.words
  assert "dull" in after.vocabulary.words
  assert_same(load(corpus, cache_dir)[0], before)


def test_entry_of_another_version_is_ignored(corpus, cache_dir, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(tokens, "_FORMAT", 3)
    load(corpus, cache_dir)
  _, lines = load(corpus, cache_dir)
  assert corpus.num_loads == 2
  assert not any("damaged" in line for line in lines)


class TestContent:
  """A source that is identified by its content finds the arrays of any source with that content."""

  @pytest.mark.parametrize("config", [CONFIG, HELD_OUT], ids=["test", "split"])
  def test_arrays_of_an_archive_with_that_content(self, corpus, cache_dir, config):
    expected, _ = load(corpus, cache_dir, config)
    official = Corpus()
    data, lines = load(official, cache_dir, config)
    assert_same(data, expected)
    assert (official.num_loads, lines) == (0, [])

  def test_arrays_of_other_settings_are_not_found(self, corpus, cache_dir):
    load(corpus, cache_dir)
    official = Corpus()
    load(official, cache_dir, HELD_OUT)
    assert official.num_loads == 1

  def test_arrays_of_other_content_are_not_found(self, cache_dir):
    load(Corpus("archive", "dull"), cache_dir)
    official = Corpus()
    load(official, cache_dir)
    assert official.num_loads == 1

  def test_unexpected_content_is_reported_and_never_passes_for_the_expected_one(self, corpus, cache_dir):
    altered = Corpus(corpus.content, "dull", content=corpus.content)
    for num_loads in (1, 2):
      data, lines = load(altered, cache_dir)
      assert "dull" in data.vocabulary.words
      assert any("not the texts of the official IMDB reviews" in line for line in lines)
      assert altered.num_loads == num_loads
    assert "fine" in load(Corpus(), cache_dir)[0].vocabulary.words

  def test_reviews_without_groups_are_not_cached_beside_those_with(self, corpus, cache_dir):
    official = Corpus()
    official.splits = {name: dataclasses.replace(split, groups=None) for name, split in official.splits.items()}
    with pytest.raises(DataError, match="--archive"):
      load(official, cache_dir, HELD_OUT)
    expected, _ = load(corpus, cache_dir, HELD_OUT)
    assert_same(load(official, cache_dir, HELD_OUT)[0], expected)

  def test_damaged_entries_do_not_hide_it(self, corpus, cache_dir):
    expected, _ = load(corpus, cache_dir)
    for number, content in enumerate(("", "[]", "null", '{"digest": 1}', "[" * 100_000)):
      (cache_dir / "tokens" / f"00{number}").mkdir()
      (cache_dir / "tokens" / f"00{number}" / "manifest.json").write_text(content)
    assert_same(load(Corpus(), cache_dir)[0], expected)


def test_manifest_tells_what_made_the_entry(corpus, cache_dir):
  data, _ = load(corpus, cache_dir)
  manifest = json.loads((entry_of(cache_dir) / "manifest.json").read_text())
  assert manifest == {
    "settings": dataclasses.asdict(CONFIG),
    "content": corpus.content,
    "rows": {"train": 12, "test": 6},
    "classes": ["negative", "positive"],
    "left_out": {},
    "digest": data.digest,
  }


class TestLock:
  def test_second_process_waits_and_reads_nothing(self, corpus, cache_dir):
    is_reading, may_go_on, is_waiting = threading.Event(), threading.Event(), threading.Event()
    found, second = [], Corpus("archive")

    def load_slowly(report):
      is_reading.set()
      assert may_go_on.wait(10)
      return corpus.load(report)

    def wait(line: str) -> None:
      assert "Waiting for another process" in line
      is_waiting.set()

    slow = dataclasses.replace(corpus.source, load=load_slowly)
    threads = [
      threading.Thread(target=lambda: found.append(tokens.load(slow, CONFIG, cache_dir=cache_dir))),
      threading.Thread(
        target=lambda: found.append(tokens.load(second.source, CONFIG, cache_dir=cache_dir, report=wait))
      ),
    ]
    threads[0].start()
    assert is_reading.wait(10)
    threads[1].start()
    assert is_waiting.wait(10)
    may_go_on.set()
    for thread in threads:
      thread.join(10)
    assert (corpus.num_loads, second.num_loads) == (1, 0)
    assert_same(*found)

  def test_filled_cache_is_read_without_the_lock(self, corpus, cache_dir):
    expected, _ = load(corpus, cache_dir)
    with filelock.FileLock(cache_dir / "tokens.lock"):
      data, lines = load(corpus, cache_dir)
    assert_same(data, expected)
    assert not lines

  def test_lock_of_a_killed_process_is_released(self, corpus, cache_dir):
    cache_dir.mkdir()
    code = (
      "import filelock, sys, time; filelock.FileLock(sys.argv[1]).acquire(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(cache_dir / "tokens.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
      assert holder.stdout is not None
      assert holder.stdout.readline() == b"held\n"
      holder.kill()
    _, lines = load(corpus, cache_dir)
    assert not any("Waiting" in line for line in lines)

  def test_lock_is_released_after_a_failure(self, corpus, cache_dir):
    corpus.splits |= {"train": corpus.splits["train"].take([])}
    for _ in range(2):
      with pytest.raises(Exception, match="no reviews left"):
        load(corpus, cache_dir)


@pytest.mark.parametrize("obstacle", ["cache", "cache/tokens", "cache/tokens.lock/folder"])
def test_unwritable_cache_is_named(corpus, tmp_path, cache_dir, obstacle):
  (tmp_path / obstacle).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / obstacle).write_text("a file where a folder should be, or the reverse")
  with pytest.raises(DataError, match=f"--cache-dir {cache_dir}: cannot be written") as caught:
    load(corpus, cache_dir)
  assert len(str(caught.value).splitlines()) == 1
