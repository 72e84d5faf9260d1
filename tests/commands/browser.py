"""A real browser, driven through the WebDriver protocol of chromedriver."""

import base64
import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
# The protocol's name of the field that holds an element's id.
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
  """A headless Chromium with one tab."""

  def __init__(self):
    command = [str(CHROMEDRIVER), "--port=0"]
    self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert self._driver.stdout is not None
    line = next(line for line in self._driver.stdout if "successfully on port" in line)
    self._port, self._session = int(line.rstrip(".\n").split()[-1]), ""
    # Containers have no user namespaces, and little shared memory.
    flags = ["--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    options = {"binary": CHROMIUM, "args": flags}
    capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    started = self.do("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
    self._session = f"/{started['sessionId']}"

  def do(self, method: str, path: str, body: Any = None) -> Any:
    """Run a command of the protocol and return its value."""
    connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
    try:
      connection.request(method, f"/session{self._session}{path}", None if body is None else json.dumps(body))
      value = json.loads(connection.getresponse().read())["value"]
    finally:
      connection.close()
    assert not (isinstance(value, dict) and "error" in value), value["message"]
    return value

  def cdp(self, command: str, **parameters: Any) -> None:
    """Run a command of the browser's own protocol."""
    self.do("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

  def open(self, url: str, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
    """Open a page in a window of a size and a colour scheme."""
    self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    self.do("POST", "/url", {"url": url})
    # A page gets its focus when it is first drawn, which may be after it has been loaded.
    _wait_for(
      lambda: self.script("return document.activeElement !== document.body"), 20, lambda: "nothing has the focus"
    )

  def script(self, code: str) -> Any:
    """Return what a script returns."""
    return self.do("POST", "/execute/sync", {"script": code, "args": []})

  def text(self, selector: str) -> str:
    """Return the text of an element, also if it is not visible."""
    return self.script(f"return document.querySelector({json.dumps(selector)}).textContent")

  def active(self, *, path: str = "") -> Any:
    """Return a property of the element that has the focus, or its id."""
    element = self.do("GET", "/element/active")[_ELEMENT]
    return self.do("GET", f"/element/{element}{path}") if path else element

  def type(self, text: str) -> None:
    """Type a text, key by key, where the focus is."""
    self.do("POST", f"/element/{self.active()}/value", {"text": text})

  def wait(self, selector: str, words: str, seconds: float = 20) -> str:
    """Wait until an element's text holds some words, and return its text."""
    _wait_for(lambda: words in self.text(selector), seconds, lambda: f"{selector} is {self.text('main')!r}")
    return self.text(selector)

  def console(self) -> list[str]:
    """Return what the page has logged since the last call."""
    return [entry["message"] for entry in self.do("POST", "/se/log", {"type": "browser"})]

  def screenshot(self, path: Path) -> None:
    """Save what the window shows."""
    path.write_bytes(base64.b64decode(self.do("GET", "/screenshot")))

  def close(self) -> None:
    """End the browser."""
    try:
      self.do("DELETE", "")
    finally:
      self._driver.terminate()
      self._driver.communicate()


def _wait_for(condition: Callable[[], bool], seconds: float, problem: Callable[[], str]) -> None:
  give_up_at = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < give_up_at, problem()
    time.sleep(0.05)
