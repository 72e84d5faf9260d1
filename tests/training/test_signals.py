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
