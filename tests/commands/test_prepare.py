"""`prepare`."""

import os
import shutil
import subprocess
import sys

import pytest
from running import ROOT, TINY, assert_one_clear_line, run


def test_a_missing_archive_is_one_clear_line(tmp_path, call):
  result = call("prepare", "--archive", tmp_path / "none.tar.gz", "--data-dir", tmp_path / "new" / "store")
  assert_one_clear_line(result, 3, "none.tar.gz")


def test_the_archive_is_required(call):
  assert_one_clear_line(call("imdb-jax", "prepare"), 2, "--archive")


def test_the_store_is_made_from_the_archive_and_its_folder_is_shown(tmp_path, monkeypatch, call):
  tfds_imdb = pytest.importorskip("imdb_jax.data.tfds_imdb", exc_type=ImportError)
  monkeypatch.setattr(tfds_imdb, "prepare", lambda data_dir, archive: data_dir / archive.stem)
  code, stdout, _ = call("prepare", "--archive", tmp_path / "reviews.tar", "--data-dir", tmp_path / "stores")
  assert (code, stdout) == (0, f"{tmp_path / 'stores' / 'reviews'}\n")


@pytest.mark.slow
@pytest.mark.skipif("IMDB_ARCHIVE" not in os.environ, reason="IMDB_ARCHIVE names no archive of the real reviews")
def test_a_node_without_network_trains_on_what_another_has_prepared(tmp_path):
  if shutil.which("unshare") is None or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
    pytest.skip("a network namespace requires root")
  assert run("prepare", "--archive", os.environ["IMDB_ARCHIVE"], "--data-dir", tmp_path / "cache")[0] == 0
  flags = ("--cache-dir", tmp_path / "cache", *TINY[2:], "--run-dir", tmp_path / "run")
  command = ["unshare", "--net", sys.executable, ROOT / "scripts" / "train.py", *flags]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stderr) == (0, "")
  assert "Epoch 2/2" in done.stdout
