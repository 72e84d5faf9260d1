"""The official IMDB reviews, the Large Movie Review Dataset: facts about them, and their download."""

import http.client
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from imdb_jax.data.reviews import NEGATIVE, POSITIVE, UNLABELLED
from imdb_jax.errors import DataError
from imdb_jax.store import files

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
SIZE = 84_125_825  # bytes
_MIB = 2**20

# `reviews.content` of the official texts.
CONTENT = (
  "cdf7738840818ea7578deb141a8af6e056feedbf11dcb9a46c064ec6934666e1 "
  "d655bb2abbbafcdcff3d4edc6d2cb215119c504d9a3dce4ba9d7352b610d3839"
)

LABELLED_SPLITS = ("train", "test")
SPLITS = (*LABELLED_SPLITS, "unsupervised")
# Folder of the archive: the split of its reviews, and their label.
KINDS: Mapping[str, tuple[str, int]] = {
  "train/neg": ("train", NEGATIVE),
  "train/pos": ("train", POSITIVE),
  "train/unsup": ("unsupervised", UNLABELLED),
  "test/neg": ("test", NEGATIVE),
  "test/pos": ("test", POSITIVE),
}
COUNTS: Mapping[str, int] = {kind: 50_000 if kind == "train/unsup" else 12_500 for kind in KINDS}


def check_counts(counts: Mapping[str, int], expected: Mapping[str, int]) -> None:
  """Raise ValueError if the number of reviews of a kind is wrong. The unlabelled reviews may all be absent."""
  for kind in sorted({*expected, *counts}):
    count, wanted = counts.get(kind, 0), expected.get(kind, 0)
    if count != wanted and (count or kind != "train/unsup"):
      raise ValueError(f"{kind} has {count:,} reviews, expected {wanted:,}")


def download(directory: Path, report: Callable[[str], None], *, timeout: float = 10) -> Path:
  """Download the official archive into a folder, unless it is already there and intact, and return its path.

  `report` gets a line per 10 MiB. Each connection, and each read from it, may take `timeout` seconds. Raises DataError
  if the download fails; it is not retried.
  """
  target = directory / PurePosixPath(URL).name
  try:
    if target.is_file() and target.stat().st_size <= SIZE and files.sha256(target) == SHA256:
      return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="incomplete-") as incomplete:
      part = Path(incomplete, target.name)
      with urllib.request.urlopen(URL, timeout=timeout) as response, part.open("wb") as file:
        while file.tell() <= SIZE and (chunk := response.read(_MIB)):
          size = file.tell() + file.write(chunk)
          if size % (10 * _MIB) == 0 or size == SIZE:
            report(f"Downloaded {size // _MIB} of {SIZE // _MIB} MiB")
      size, sha256 = part.stat().st_size, files.sha256(part)
      if (size, sha256) != (SIZE, SHA256):
        raise ValueError(f"got {size:,} bytes with sha256 {sha256}")
      part.replace(target)
  except (OSError, ValueError, http.client.HTTPException) as error:
    if isinstance(error, urllib.error.HTTPError):
      error.close()  # It holds the connection.
    reason = " ".join(str(error).split()) or type(error).__name__
    raise DataError(
      f"cannot download {URL} ({reason}): download it elsewhere ({SIZE:,} bytes, sha256 {SHA256}) "
      "and use --archive PATH"
    ) from error
  return target
