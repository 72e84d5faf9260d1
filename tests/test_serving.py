"""The HTTP service around a classifier that answers when the test lets it."""

import asyncio
import json
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from imdb_jax.serving import service as service_lib
from imdb_jax.serving.service import Service


class Words:
  """An ensemble of one run, and that run. The probability of a class is the share of its letter in the text.

  Attributes:
    batches: the texts of each call.
    proceed: calls wait for it.
  """

  classes = ("a", "b", "c")
  step = 1
  config = types.SimpleNamespace(run_dir=Path("run"))

  def __init__(self):
    self.classifiers = (self,)
    self.batches: list[list[str]] = []
    self.started, self.proceed, self._running = threading.Semaphore(0), threading.Semaphore(0), 0

  def answers(self, texts: list[str]) -> list[dict[str, Any]]:
    self._running += 1
    assert self._running == 1, "concurrent predictions"
    self.batches.append(texts)
    self.started.release()
    assert self.proceed.acquire(timeout=30)
    self._running -= 1
    if "!" in "".join(texts):
      raise ValueError("!")
    return [self._answer(text) for text in texts]

  def _answer(self, text: str) -> dict[str, Any]:
    probabilities = {name: (text.count(name) + 1) / (len(text) + 3) for name in self.classes}
    known_words = sum(map(text.count, self.classes))
    name = max(probabilities, key=probabilities.__getitem__) if known_words else None
    return {"class": name, "probabilities": probabilities, "known_words": known_words}


async def ask(service: Service, *pieces: bytes | float) -> tuple[int, dict[str, Any]]:
  """Send a body in pieces; a number is a pause in seconds. Return status and answer."""
  left, sent = list(pieces), []

  async def receive():
    while left and isinstance(left[0], float):
      await asyncio.sleep(left.pop(0))
    if not left:
      return {"type": "http.disconnect"}
    return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

  async def send(message):
    sent.append(message)

  scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b"", "root_path": ""}
  try:
    await service.app(scope, receive, send)
  except ValueError as error:
    # Starlette hands errors of the program to the server, which logs them, after the answer.
    assert str(error) == "!"
  return sent[0]["status"], json.loads(sent[1]["body"])


def body(*texts: str) -> bytes:
  return json.dumps({"texts": texts}).encode()


def started(classifier: Words) -> Any:
  """Wait for the start of a batch."""
  return asyncio.to_thread(classifier.started.acquire, timeout=30)


def test_requests_that_wait_are_answered_together():
  async def run():
    classifier = Words()
    service = Service(classifier)
    requests = [asyncio.create_task(ask(service, body("a")))]
    assert await started(classifier)
    for texts in (["b"], ["cc", "a"], ["x"]):
      requests.append(asyncio.create_task(ask(service, body(*texts))))
    await asyncio.sleep(0.05)
    classifier.proceed.release(2)
    answers = [answer["answers"] for status, answer in await asyncio.gather(*requests) if status == 200]
    assert classifier.batches == [["a"], ["b", "cc", "a", "x"]]
    assert [[each["class"] for each in some] for some in answers] == [["a"], ["b"], ["c", "a"], [None]]
    assert answers[2][0] == {"class": "c", "probabilities": {"a": 0.2, "b": 0.2, "c": 0.6}, "known_words": 2}

  asyncio.run(run())


def test_a_batch_has_no_more_texts_than_the_cap(monkeypatch):
  monkeypatch.setattr(service_lib, "MAX_TEXTS", 4)

  async def run():
    classifier = Words()
    service = Service(classifier)
    requests = [asyncio.create_task(ask(service, body(*texts))) for texts in ("a", "bb", "cc", "a", "bbb", "cccc")]
    classifier.proceed.release(10)
    answers = [[each["class"] for each in answer["answers"]] for _, answer in await asyncio.gather(*requests)]
    assert answers == [["a"], ["b", "b"], ["c", "c"], ["a"], ["b"] * 3, ["c"] * 4]
    assert [len(batch) for batch in classifier.batches[1:]] == [4, 4, 4]

  asyncio.run(run())


def test_a_failed_batch_is_reported_and_the_next_one_answered():
  async def run():
    classifier = Words()
    service = Service(classifier)
    failing = [asyncio.create_task(ask(service, body("!")))]
    assert await started(classifier)
    # The second batch has two requests.
    failing += [asyncio.create_task(ask(service, body(*texts))) for texts in ("!a", "b")]
    await asyncio.sleep(0.05)
    classifier.proceed.release(2)
    for status, answer in await asyncio.gather(*failing):
      assert (status, answer) == (500, {"error": "The prediction failed; the log of the service says why."})
    classifier.proceed.release()
    assert (await ask(service, body("a")))[0] == 200

  asyncio.run(run())


def test_a_cancelled_request_takes_only_its_batch_along():
  """The server cancels requests that are not answered in time after a signal."""

  async def run():
    classifier = Words()
    service = Service(classifier)
    requests = [asyncio.create_task(ask(service, body("a")))]
    assert await started(classifier)
    requests += [asyncio.create_task(ask(service, body("b"))) for _ in range(2)]
    await asyncio.sleep(0.05)
    classifier.proceed.release()
    assert await started(classifier)
    requests[1].cancel()
    classifier.proceed.release()
    found = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), timeout=30)
    assert [type(each) for each in found] == [tuple, asyncio.CancelledError, asyncio.CancelledError]
    classifier.proceed.release()
    assert (await ask(service, body("a")))[0] == 200

  asyncio.run(run())


def test_a_client_that_leaves_or_sends_slowly_frees_its_place(monkeypatch):
  monkeypatch.setattr(service_lib, "_SECONDS_TO_SEND", 0.1)
  monkeypatch.setattr(service_lib, "MAX_REQUESTS", 1)

  async def run():
    classifier = Words()
    classifier.proceed.release(10)
    service = Service(classifier)
    slow = asyncio.create_task(ask(service, b'{"texts":', 60.0, b'["a"]}'))
    await asyncio.sleep(0)
    assert (await ask(service, body("a")))[0] == 503
    assert (await slow)[0] == 408
    assert (await ask(service, b'{"texts":', 0.01))[0] == 408
    assert (await ask(service, b'{"texts":', 0.01, b'["a"]}'))[0] == 200

  asyncio.run(run())


def test_addresses_of_the_sixth_version_can_be_bound():
  try:
    listener = service_lib.listen("::1", 0)
  except service_lib.UsageError as error:
    pytest.skip(str(error))
  with listener:
    assert listener.getsockname()[0] == "::1"
