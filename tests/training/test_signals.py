"""The first signal is heeded, the second is obeyed."""

import os
import signal

import pytest

from imdb_jax.training.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_is_left_to_the_kernel(number):
  before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
  with StopRequest() as stop:
    assert stop.signal is None
    os.kill(os.getpid(), number)
    assert stop.signal == number
    assert {signal.getsignal(each) for each in before} == {signal.SIG_DFL}
  assert {each: signal.getsignal(each) for each in before} == before


def test_what_a_shell_has_a_run_ignore_stays_ignored():
  previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with StopRequest() as stop:
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.signal is None
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.signal == signal.SIGTERM
      assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, previous)
