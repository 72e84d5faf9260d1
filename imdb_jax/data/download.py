"""Download of the official archive."""

import http.client
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from imdb_jax.data import imdb
from imdb_jax.errors import DataError
from imdb_jax.store import files

_MIB = 2**20


def download(directory: Path, report: Callable[[str], None], *, timeout: float = 10) -> Path:
  """Download the official archive into `directory`, unless it is already there and intact, and return its path.

  Args:
    directory: created if it does not exist.
    report: called with a line per 10 MiB.
    timeout: seconds allowed for each connection, and for each read from it.

  Raises:
    DataError: the download failed; it is not retried.
  """
  target = directory / PurePosixPath(imdb.URL).name
  try:
    if target.is_file() and target.stat().st_size <= imdb.SIZE and files.sha256(target) == imdb.SHA256:
      return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="incomplete-") as incomplete:
      part = Path(incomplete, target.name)
      with urllib.request.urlopen(imdb.URL, timeout=timeout) as response, part.open("wb") as file:
        while file.tell() <= imdb.SIZE and (chunk := response.read(_MIB)):
          size = file.tell() + file.write(chunk)
          if size % (10 * _MIB) == 0 or size == imdb.SIZE:
            report(f"Downloaded {size // _MIB} of {imdb.SIZE // _MIB} MiB")
      size, sha256 = part.stat().st_size, files.sha256(part)
      if (size, sha256) != (imdb.SIZE, imdb.SHA256):
        raise ValueError(f"got {size:,} bytes with sha256 {sha256}")
      part.replace(target)
  except (OSError, ValueError, http.client.HTTPException) as error:
    if isinstance(error, urllib.error.HTTPError):
      error.close()  # It holds the connection.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise DataError(
      f"cannot download {imdb.URL} ({reason}): download it elsewhere ({imdb.SIZE:,} bytes, sha256 {imdb.SHA256}) "
      "and use --archive PATH"
    ) from error
  return target
