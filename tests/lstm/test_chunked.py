"""The fast path keeps the contract."""

from lstm.contract import LstmContract


class TestChunked(LstmContract):
  implementation = "chunked"
