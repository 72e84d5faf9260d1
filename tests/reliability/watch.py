"""A watch that notices whenever a file in a folder is opened, also for reading."""

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from reliability.sandbox import require

# From Linux's inotify.h: opened, created or moved here, removed or moved away; a folder; and the head of an event.
_OPENED, _CREATED, _REMOVED, _IS_FOLDER = 0x20, 0x180, 0x240, 0x40000000
_EVENT = struct.Struct("iIII")


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
  """Raise Failure if a file in a folder is opened, created or removed within the context."""
  libc = ctypes.CDLL(None, use_errno=True)
  queue = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
  if queue < 0 or libc.inotify_add_watch(queue, os.fsencode(folder), _OPENED | _CREATED | _REMOVED) < 0:
    raise OSError(ctypes.get_errno(), f"inotify: {os.strerror(ctypes.get_errno())}")
  try:
    yield
    with contextlib.suppress(BlockingIOError):
      _require_no_event(folder, os.read(queue, 2**16))
  finally:
    os.close(queue)


def _require_no_event(folder: Path, events: bytes) -> None:
  offset = 0
  while offset < len(events):
    _, mask, _, length = _EVENT.unpack_from(events, offset)
    offset += _EVENT.size + length
    name = events[offset - length : offset].rstrip(b"\0").decode()
    # The snapshots of the trials list the folder.
    require(bool(mask & _IS_FOLDER), f"{folder.name}/{name} was opened, created or removed")
