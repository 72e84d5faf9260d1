"""Facts about the official IMDB reviews, the Large Movie Review Dataset."""

from collections.abc import Mapping

from imdb_jax.data.reviews import NEGATIVE, POSITIVE, UNLABELLED

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
SIZE = 84_125_825  # bytes

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
