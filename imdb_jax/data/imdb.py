"""The IMDB reviews, from wherever they are: a local archive, a record store, or the official download."""

import hashlib
import http.client
import importlib.util
import json
import os
import pathlib
import queue
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from imdb_jax import errors
from imdb_jax.data import archive as archive_lib
from imdb_jax.data import reviews
from imdb_jax.data.archive import OFFICIAL_SHA256, OFFICIAL_SIZE, OFFICIAL_URL

STORE = pathlib.PurePath("imdb_reviews", "plain_text", "1.0.0")

# `reviews.content_digest` of the official texts, whatever archive or store they come from.
OFFICIAL_CONTENT = {
  "train": "cdf7738840818ea7578deb141a8af6e056feedbf11dcb9a46c064ec6934666e1",
  "test": "d655bb2abbbafcdcff3d4edc6d2cb215119c504d9a3dce4ba9d7352b610d3839",
}

_CHUNK_BYTES = 2**20


def load(
  archive: pathlib.Path | None,
  data_dir: pathlib.Path,
  *,
  progress: Callable[[int, int], None] | None = None,
) -> dict[str, reviews.Reviews]:
  """Returns the splits "train", "test" and "unsupervised", in canonical order whatever the source.

  The source is `archive` if given; else the first record store in `data_dir`, $TFDS_DATA_DIR or
  ~/tensorflow_datasets; else the official archive, downloaded into `data_dir` and kept there as a record store.
  `films` is None where the source does not tell them: a store of the stock builder, an archive without urls files.

  Args:
    archive: what `archive.read_archive` takes, or None.
    data_dir: where to look first, and where to keep what is downloaded.
    progress: as in `download`.

  Raises:
    DataError: the reviews cannot be had, or the source is damaged or incomplete.
  """
  if archive is not None:
    return archive_lib.read_archive(archive)
  if not _can_use_stores():
    return archive_lib.read_archive(download(data_dir / "downloads", progress=progress))

  # Only here, as it takes long to import and may be absent.
  from imdb_jax.data import tfds_imdb

  shared = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
  store = find_store([data_dir, shared])
  if store is None:
    store = tfds_imdb.prepare(data_dir, download(data_dir / "downloads", progress=progress))
  return tfds_imdb.read_store(store)


def find_store(directories: Sequence[pathlib.Path]) -> pathlib.Path | None:
  """The first record store below `directories`, the roots of tfds stores; None if there is none.

  Stores of another format than ArrayRecord are passed over: only TensorFlow reads them.
  """
  for directory in directories:
    path = directory / STORE
    try:
      info = json.loads((path / "dataset_info.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
      continue
    except (OSError, ValueError):
      return path  # `read_store` says what is wrong with it
    if not isinstance(info, dict) or info.get("fileFormat") == "array_record":
      return path
  return None


def download(
  directory: pathlib.Path, *, timeout: float = 10, progress: Callable[[int, int], None] | None = None
) -> pathlib.Path:
  """Downloads the official archive into `directory`, unless it is there already and whole.

  Args:
    directory: created if it does not exist.
    timeout: seconds that the connection, and then each read from it, may take.
    progress: called with the bytes so far and the bytes in all.

  Returns:
    The archive, whose size and SHA-256 are the official ones.

  Raises:
    DataError: after one failed attempt.
  """
  target = directory / pathlib.PurePosixPath(OFFICIAL_URL).name
  try:
    if target.is_file() and archive_lib.fingerprint(target) == OFFICIAL_SHA256:
      return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="incomplete-") as incomplete:
      part = pathlib.Path(incomplete, target.name)
      _fetch(part, timeout, progress)
      part.replace(target)
  except (OSError, ValueError, http.client.HTTPException) as error:
    reason = " ".join(str(error).split()) or type(error).__name__
    raise errors.DataError(
      f"cannot download {OFFICIAL_URL} ({reason}): fetch it elsewhere, {OFFICIAL_SIZE:,} bytes with sha256 "
      f"{OFFICIAL_SHA256}, and give --archive PATH"
    ) from error
  return target


def _can_use_stores() -> bool:
  return all(importlib.util.find_spec(name) for name in ("tensorflow_datasets", "array_record"))


def _fetch(part: pathlib.Path, timeout: float, progress: Callable[[int, int], None] | None) -> None:
  """Writes the official archive to `part`; raises ValueError where it is not the official one."""
  digest = hashlib.sha256()
  size = 0
  with _connect(OFFICIAL_URL, timeout) as response, part.open("wb") as file:
    while size <= OFFICIAL_SIZE and (chunk := response.read(_CHUNK_BYTES)):
      file.write(chunk)
      digest.update(chunk)
      size += len(chunk)
      if progress is not None:
        progress(size, OFFICIAL_SIZE)
  if size != OFFICIAL_SIZE:
    raise ValueError(f"got {'more' if size > OFFICIAL_SIZE else f'only {size:,}'} bytes")
  if digest.hexdigest() != OFFICIAL_SHA256:
    raise ValueError(f"got sha256 {digest.hexdigest()}")


def _connect(url: str, timeout: float) -> http.client.HTTPResponse:
  """Opens `url` within `timeout` seconds in all.

  urllib's own limit does not cover name resolution, and starts anew for each address of the host and each redirect.
  """
  outcome: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()

  def connect():
    try:
      outcome.put(urllib.request.urlopen(url, timeout=timeout))
    except Exception as error:
      if isinstance(error, urllib.error.HTTPError):
        error.close()  # it holds the connection
      outcome.put(error)

  # A daemon, so that a resolver that hangs cannot keep the program from ending.
  threading.Thread(target=connect, daemon=True).start()
  try:
    result = outcome.get(timeout=timeout)
  except queue.Empty:
    raise TimeoutError(f"no answer within {timeout:g} s") from None
  if isinstance(result, Exception):
    raise result
  return result
