"""The first signal is heeded, the second is obeyed."""

import os
import signal

import pytest

from imdb_jax.training.signals import StopRequest

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_is_noted_and_the_second_is_left_to_the_kernel(number):
  before = {each: signal.getsignal(each) for each in ALL}
  with StopRequest() as stop:
    assert stop.signal is None
    os.kill(os.getpid(), number)
    assert stop.signal == number
    assert {signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
  assert {each: signal.getsignal(each) for each in ALL} == before


def test_a_terminal_that_hangs_up_twice_ends_nothing():
  with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  assert stop.signal == signal.SIGHUP


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_shell_has_a_run_ignore_stays_ignored(number):
  previous = signal.signal(number, signal.SIG_IGN)
  try:
    with StopRequest() as stop:
      os.kill(os.getpid(), number)
      assert stop.signal is None
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.signal == signal.SIGTERM
      assert signal.getsignal(number) == signal.SIG_IGN
    assert signal.getsignal(number) == signal.SIG_IGN
  finally:
    signal.signal(number, previous)
