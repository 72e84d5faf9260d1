"""The readable reference keeps the contract."""

from lstm.contract import LstmContract


class TestScan(LstmContract):
  implementation = "scan"
