"""A service in a process of its own, and clients of it."""

import contextlib
import http.client
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from running import start

# Status, headers and body of an answer.
Answer = tuple[int, http.client.HTTPMessage, bytes]


class Service:
  """A running service. `stop` ends it."""

  def __init__(self, run_dir: Path, *arguments: str | Path):
    self.process: subprocess.Popen = start("serve", run_dir, *arguments, "--platform", "cpu", "--port", "0")
    assert self.process.stdout is not None
    line = self.process.stdout.readline().decode()
    assert line.startswith("Answers at http://127.0.0.1:"), self.process.communicate()
    self.url = line.split()[-1]
    self.port = int(self.url.rstrip("/").rpartition(":")[2])

  def connect(self) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

  def ask(self, method: str, path: str, body: Any = None) -> Answer:
    """Return the answer to one request."""
    with contextlib.closing(self.connect()) as connection:
      connection.request(method, path, body)
      response = connection.getresponse()
      return response.status, response.headers, response.read()

  def predict(self, **fields: Any) -> Any:
    """Return the answer to a request that succeeds."""
    status, _, body = self.ask("POST", "/predict", json.dumps(fields))
    assert status == 200, body
    return json.loads(body)

  def metrics(self) -> dict[str, float]:
    """Return the values of /metrics by name and label."""
    lines = self.ask("GET", "/metrics")[2].decode().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if line[0] != "#")}

  def begin(self, body: bytes) -> http.client.HTTPConnection:
    """Send a request without the last byte of its body."""
    connection = self.connect()
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:-1])
    return connection

  def stop(self, number: signal.Signals = signal.SIGTERM) -> str:
    """Stop the service and return what it wrote to standard error."""
    self.process.send_signal(number)
    _, stderr = self.process.communicate(timeout=60)
    # As after a signal that is not handled; a shell shows it as 130 or 143.
    assert self.process.returncode == -number
    return stderr.decode()


@contextlib.contextmanager
def serving(run_dir: Path, *arguments: str | Path) -> Iterator[Service]:
  """Run a service, and check in the end that it had nothing to complain about."""
  service = Service(run_dir, *arguments)
  try:
    yield service
    assert service.process.poll() is not None or service.stop() == ""
  finally:
    service.process.kill()
    service.process.communicate()
