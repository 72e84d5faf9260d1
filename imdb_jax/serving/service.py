"""The HTTP service: predictions, health, metrics, and a page to type texts into."""

import asyncio
import base64
import collections
import functools
import hashlib
import json
import re
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from imdb_jax import explanation
from imdb_jax.errors import UsageError, first_line, reraise_as
from imdb_jax.prediction import Ensemble

# Limits of a request, and of requests at once. openapi.json and docs/serving.md name them, too.
MAX_BODY_BYTES, MAX_TEXTS, MAX_REQUESTS = 2**22, 256, 64
# Seconds that a client may take to send its request, and that requests in progress may take after a signal.
_SECONDS_TO_SEND, _SECONDS_TO_STOP = 10, 30


class Service:
  """Endpoints around an ensemble of one run or more; `app` is the ASGI application."""

  def __init__(self, ensemble: Ensemble):
    self._ensemble, self._turn, self._worker = ensemble, asyncio.Lock(), ThreadPoolExecutor(1)
    self._waiting: collections.deque[tuple[list[str], asyncio.Future[list[Any]]]] = collections.deque()
    self._in_progress = self._num_texts = self._num_batches = 0
    self._requests, self._seconds = collections.Counter({200: 0}), 0.0
    page, openapi = ((Path(__file__).parent / file).read_text("utf-8") for file in ("page.html", "openapi.json"))
    self._runs = [{"run": each.config.run_dir.resolve().name, "step": each.step} for each in ensemble.classifiers]
    health = {"status": "ok", "runs": self._runs, "classes": ensemble.classes}
    routes = {"/": Response(page, media_type="text/html", headers=_page_headers(page))}
    routes |= {"/openapi.json": Response(openapi, media_type="application/json"), "/health": JSONResponse(health)}
    self.app = Starlette(
      routes=[Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()]
      + [Route("/predict", functools.partial(self._post, self._predict), methods=["POST"])]
      + [Route("/explain", functools.partial(self._post, self._explain), methods=["POST"])]
      + [Route("/metrics", self._metrics)],
      exception_handlers={HTTPException: self._refuse, Exception: self._refuse},
    )

  async def _post(self, answer: Callable[[list[str], bool], Awaitable[Any]], request: Request) -> Response:
    if self._in_progress == MAX_REQUESTS:
      raise HTTPException(503, f"{MAX_REQUESTS} requests are in progress; try again.", {"Retry-After": "1"})
    started, self._in_progress = time.perf_counter(), self._in_progress + 1
    try:
      found = await answer(*_parse(await _read(request)))
    finally:
      self._in_progress -= 1
      self._seconds += time.perf_counter() - started
    self._requests[200] += 1
    return JSONResponse(found)

  async def _predict(self, texts: list[str], is_single: bool) -> Any:
    answers = await self._answers(texts)
    return answers[0] if is_single else {"answers": answers}

  async def _explain(self, texts: list[str], is_single: bool) -> Any:
    if not is_single:
      raise HTTPException(400, 'The body must be {"text": "..."}; texts are explained one by one.')
    return await asyncio.get_running_loop().run_in_executor(self._worker, self._explanations, texts[0])

  def _explanations(self, text: str) -> dict[str, Any]:
    """Return the explanation of each run. The client has the text, so places are enough."""
    runs = []
    for run, classifier in zip(self._runs, self._ensemble.classifiers, strict=True):
      (found,) = classifier.explain([text])
      names = ("label", "logit", "baseline_logit", "error", "change")
      places = ("start", "end", "contribution")
      words = [{name: getattr(word, name) for name in places} for word in explanation.joined(found)]
      runs.append(run | {name: getattr(found, name) for name in names} | {"words": words})
    return {"runs": runs}

  async def _answers(self, texts: list[str]) -> list[dict[str, Any]]:
    """Return an answer per text. What has arrived during a computation is computed together after it."""
    answers = asyncio.get_running_loop().create_future()
    self._waiting.append((texts, answers))
    async with self._turn:
      while not answers.done():
        requests, batch = [], []
        while self._waiting and (not batch or len(batch) + len(self._waiting[0][0]) <= MAX_TEXTS):
          requests.append(self._waiting.popleft())
          batch += requests[-1][0]
        self._num_texts, self._num_batches = self._num_texts + len(batch), self._num_batches + 1
        try:
          computed = iter(await asyncio.get_running_loop().run_in_executor(self._worker, self._ensemble.answers, batch))
        # Also if this request is cancelled: no other one would answer its batch.
        except BaseException as error:
          for _, waiting in requests:
            waiting.set_exception(error)
        else:
          for some, waiting in requests:
            waiting.set_result([next(computed) for _ in some])
    return answers.result()

  async def _metrics(self, _: Request) -> Response:
    statuses = {f'{{status="{status}"}}': count for status, count in self._requests.items()}
    values = {"requests_total": statuses, "request_seconds_total": {"": self._seconds}}
    values |= {"texts_total": {"": self._num_texts}, "batches_total": {"": self._num_batches}}
    values |= {"requests_in_progress": {"": self._in_progress}}
    lines = []
    for name, by_label in values.items():
      lines.append(f"# TYPE imdb_jax_{name} {'counter' if name.endswith('total') else 'gauge'}")
      lines += [f"imdb_jax_{name}{label} {value}" for label, value in by_label.items()]
    return Response("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")

  async def _refuse(self, _: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
      # Starlette raises it again, and uvicorn logs it.
      error = HTTPException(500, "The prediction failed; the log of the service says why.")
    self._requests[error.status_code] += 1
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _page_headers(page: str) -> dict[str, str]:
  """Return headers that let a page run its own script, talk to this service, and do nothing else."""
  policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
  policy += "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
  for tag, content in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL):
    policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
  return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


async def _read(request: Request) -> bytes:
  body, size = bytearray(), 0
  try:
    async with asyncio.timeout(_SECONDS_TO_SEND):
      async for piece in request.stream():
        size += len(piece)
        # The rest is read and dropped: closing the connection now would keep the answer from the client.
        body += piece if size <= MAX_BODY_BYTES else b""
  except (TimeoutError, ClientDisconnect) as error:
    raise HTTPException(408, f"The request did not arrive within {_SECONDS_TO_SEND} seconds.") from error
  if size > MAX_BODY_BYTES:
    raise HTTPException(413, f"The body has more than {MAX_BODY_BYTES:,} bytes.")
  return bytes(body)


def _parse(body: bytes) -> tuple[list[str], bool]:
  """Return the texts of a body, and whether it has one text without a list."""
  try:
    fields = json.loads(body.decode())
  except (ValueError, RecursionError) as error:
    raise HTTPException(400, f"The body is not JSON in UTF-8: {first_line(error)}.") from error
  if isinstance(fields, dict) and list(fields) in (["text"], ["texts"]):
    is_single, texts = "text" in fields, fields.get("texts", [fields.get("text")])
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
      if len(texts) > MAX_TEXTS:
        raise HTTPException(413, f"There are {len(texts):,} texts; a request may have {MAX_TEXTS}.")
      return texts, is_single
  raise HTTPException(400, 'The body must be {"text": "..."} or {"texts": ["...", ...]}, with at least one text.')


def listen(host: str, port: int) -> socket.socket:
  """Return a listening socket, for port 0 on a free port; raise UsageError if there is none to be had."""
  if not 0 <= port < 2**16:
    raise UsageError(f"--port {port}: must be from 0 to {2**16 - 1}.")
  with reraise_as(UsageError, f"--host {host:.80} --port {port}", (OSError, UnicodeError)):
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def serve(ensemble: Ensemble, listener: socket.socket) -> None:
  """Answer requests until SIGINT or SIGTERM, finish those in progress, and end the process by that signal."""
  for each in ensemble.classifiers:
    each.warmup()
    each.explain([""])
  app = Service(ensemble).app
  # Errors go to the root logger. Requests are not logged.
  logging: dict[str, Any] = {"log_config": None, "log_level": "error", "access_log": False}
  server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=_SECONDS_TO_STOP, **logging))
  host, port = listener.getsockname()[:2]
  print(f"Answers at http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
  server.run(sockets=[listener])
