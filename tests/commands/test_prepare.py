"""`prepare`."""

import pytest
from running import assert_one_clear_line


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
