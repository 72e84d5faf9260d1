"""Messages for people."""

import pytest

from imdb_jax.errors import first_line


@pytest.mark.parametrize(
  ("message", "line"),
  [("", "ValueError"), ("\nA reason.\nand a stack trace", "A reason"), ("x" * 300, "x" * 300)],
)
def test_the_first_line_of_a_message(message, line):
  assert first_line(ValueError(message)) == line


def test_a_long_line_keeps_its_beginning_and_its_reason():
  line = first_line(OSError(f"Error writing {'long/' * 100}: No space left on device"))
  assert len(line) == 300
  assert line.startswith("Error writing long/") and line.endswith("No space left on device")
