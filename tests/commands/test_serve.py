"""`serve`: answers over HTTP, limits, and the end."""

import concurrent.futures
import contextlib
import json
import signal
import socket
import sys
import time

import numpy as np
import pytest
from running import assert_one_clear_line
from serving import serving

from imdb_jax import Classifier
from imdb_jax.serving import service as service_lib

REVIEW = "A film I will not forget."
BODY = json.dumps({"text": REVIEW}).encode()


@pytest.fixture(scope="module")
def service(trained):
  with serving(trained) as service:
    yield service


def test_answers_are_those_of_the_classifier(service, trained):
  texts = [REVIEW, "zzzz qqqq", "", "a great film " * 50, "Ein schöner Film \u2603 \ud800"]
  classifier = Classifier.load(trained)
  expected = classifier.predict_proba(texts)
  answers = service.predict(texts=texts)["answers"]
  # Both use one program, but the number of devices may differ.
  found = [[answer["probabilities"][name] for name in classifier.classes] for answer in answers]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  for answer, row, text in zip(answers, expected, texts, strict=True):
    assert answer["known_words"] == len(classifier.vocabulary.ids(text)[-classifier.config.data.sequence_length :])
    assert answer["class"] == (classifier.classes[row.argmax()] if answer["known_words"] else None)
  assert [answer["class"] for answer in answers[1:3]] == [None, None]
  assert None not in (answers[0]["class"], answers[3]["class"])
  single = service.predict(text=REVIEW)
  assert single.keys() == answers[0].keys()
  assert single["probabilities"]["positive"] == pytest.approx(answers[0]["probabilities"]["positive"], abs=1e-6)


@pytest.mark.parametrize(
  ("body", "status", "words"),
  [
    (b"", 400, "not JSON"),
    (b"text=good", 400, "not JSON in UTF-8: Expecting value: line 1 column 1"),
    (b'{"text": "caf\xe9"}', 400, "'utf-8' codec can't decode byte 0xe9 in position 13"),
    (b"[" * 100_000, 400, "not JSON"),
    (b'{"text": ' + b"1" * 5_000 + b"}", 400, "not JSON"),
    (b'"good"', 400, "with at least one text"),
    (b"{}", 400, "with at least one text"),
    (b'{"text": 1}', 400, "with at least one text"),
    (b'{"text": ["good"]}', 400, "with at least one text"),
    (b'{"texts": "good"}', 400, "with at least one text"),
    (b'{"texts": []}', 400, "with at least one text"),
    (b'{"texts": ["good", null]}', 400, "with at least one text"),
    (b'{"text": "good", "texts": ["bad"]}', 400, "with at least one text"),
    (b'{"text": "good", "threshold": 0.3}', 400, "with at least one text"),
    (json.dumps({"texts": ["good"] * 257}).encode(), 413, "257 texts; a request may have 256"),
    (b'{"text": "' + b"a" * 10_000_000 + b'"}', 413, "more than 4,194,304 bytes"),
    # In chunks, without a length.
    (iter([b'{"text": "', *[b"a" * 1_000_000] * 10, b'"}']), 413, "more than 4,194,304 bytes"),
  ],
)
def test_bad_requests_get_a_clear_answer(service, body, status, words):
  found, headers, content = service.ask("POST", "/predict", body)
  assert found == status
  assert headers["Content-Type"] == "application/json"
  answer = json.loads(content)
  assert answer.keys() == {"error"}
  assert words in answer["error"]
  assert "\n" not in answer["error"]
  assert service.predict(text=REVIEW)["class"]


@pytest.mark.parametrize(
  ("method", "path", "status"), [("GET", "/none", 404), ("GET", "/predict", 405), ("PUT", "/", 405)]
)
def test_other_paths_and_methods_are_refused_in_json(service, method, path, status):
  found, _, content = service.ask(method, path)
  assert (found, json.loads(content).keys()) == (status, {"error"})


def test_the_largest_permitted_requests_are_answered(service):
  assert len(service.predict(texts=["good"] * 256)["answers"]) == 256
  frame = b'{"text": ""}'
  status, _, content = service.ask("POST", "/predict", frame[:-2] + b"a" * (2**22 - len(frame)) + frame[-2:])
  assert (status, json.loads(content)["known_words"]) == (200, 0)


def test_concurrent_clients_get_their_own_answers_in_fewer_batches(service):
  texts = [f"{'good ' * (i % 7)}{'bad ' * (i // 7)}film" for i in range(48)]
  expected = service.predict(texts=texts)["answers"]
  before = service.metrics()
  with concurrent.futures.ThreadPoolExecutor(16) as clients:
    answers = list(clients.map(lambda text: service.predict(text=text), texts * 10))
  after = service.metrics()
  for answer, other in zip(answers, expected * 10, strict=True):
    assert answer["known_words"] == other["known_words"]
    assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
  added = {name: after[f"imdb_jax_{name}_total"] - before[f"imdb_jax_{name}_total"] for name in ("texts", "batches")}
  assert added["texts"] == 480
  assert added["batches"] < 480


def test_metrics_count_requests_texts_errors_and_seconds(service):
  before = service.metrics()
  service.predict(texts=["good", "bad"])
  service.ask("POST", "/predict", b"{")
  with contextlib.closing(service.begin(BODY)):
    assert before["imdb_jax_requests_in_progress"] == 0
    _wait_for(lambda: service.metrics()["imdb_jax_requests_in_progress"] == 1)
  _wait_for(lambda: service.metrics()["imdb_jax_requests_in_progress"] == 0)
  after = service.metrics()
  for name, count in (('requests_total{status="200"}', 1), ('requests_total{status="400"}', 1), ("texts_total", 2)):
    assert after[f"imdb_jax_{name}"] == before.get(f"imdb_jax_{name}", 0) + count
  assert after["imdb_jax_request_seconds_total"] > before["imdb_jax_request_seconds_total"]
  _, headers, content = service.ask("GET", "/metrics")
  assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
  names = {line.split()[2] for line in content.decode().splitlines() if line[0] == "#"}
  assert {name.split("{")[0] for name in after} == names


def test_more_requests_than_the_cap_are_told_to_come_back(service):
  with contextlib.ExitStack() as stack:
    begun = [stack.enter_context(contextlib.closing(service.begin(BODY))) for _ in range(service_lib.MAX_REQUESTS)]
    _wait_for(lambda: service.metrics()["imdb_jax_requests_in_progress"] == len(begun))
    status, headers, content = service.ask("POST", "/predict", BODY)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "64 requests are in progress" in json.loads(content)["error"]
    assert service.ask("GET", "/health")[0] == 200
    for connection in begun:
      connection.send(BODY[-1:])
    assert {connection.getresponse().status for connection in begun} == {200}
  assert service.predict(text=REVIEW)["class"]


def test_health_and_openapi_describe_the_service(service, trained):
  status, _, content = service.ask("GET", "/health")
  health = {"status": "ok", "runs": [{"run": trained.name, "step": Classifier.load(trained).step}]}
  assert (status, json.loads(content)) == (200, health | {"classes": ["negative", "positive"]})
  document = json.loads(service.ask("GET", "/openapi.json")[2])
  schemas, predict = document["components"]["schemas"], document["paths"]["/predict"]["post"]
  assert schemas["Texts"]["properties"]["texts"]["maxItems"] == service_lib.MAX_TEXTS
  assert f"{service_lib.MAX_BODY_BYTES:,} bytes" in predict["description"]
  assert str(service_lib.MAX_REQUESTS) in predict["responses"]["503"]["description"]
  for path, methods in document["paths"].items():
    assert methods.keys() == {"post" if path in ("/predict", "/explain") else "get"}
  for example in predict["requestBody"]["content"]["application/json"]["examples"].values():
    answer = service.predict(**example["value"])
    expected = "Answers" if "texts" in example["value"] else "Answer"
    assert list(answer) == schemas[expected]["required"] == list(schemas[expected]["properties"])
  assert list(json.loads(content)) == schemas["Health"]["required"]
  (run,) = explanation_of(service, REVIEW)["runs"]
  schema = schemas["Explanation"]
  assert list(run) == schema["required"] == list(schema["properties"])
  assert list(run["words"][0]) == schema["properties"]["words"]["items"]["required"]


def explanation_of(service, text):
  status, _, body = service.ask("POST", "/explain", json.dumps({"text": text}))
  assert status == 200, body
  return json.loads(body)


@pytest.mark.parametrize("text", [REVIEW, "zzzz <b>qqqq</b> \u2603 \ud800 film", "", "bad film " * 100])
def test_the_contributions_of_each_run_are_those_of_the_classifier(service, trained, text):
  (expected,) = Classifier.load(trained).explain([text])
  (run,) = explanation_of(service, text)["runs"]
  assert run["run"] == trained.name
  assert run["logit"] == pytest.approx(expected.logit, abs=1e-5)
  seen = [(word.start, word.end, word.contribution) for word in expected.words if word.contribution is not None]
  found = [tuple(word.values()) for word in run["words"] if word["contribution"] is not None]
  assert [each[:2] for each in found] == [each[:2] for each in seen]
  assert [each[2] for each in found] == pytest.approx([each[2] for each in seen], abs=1e-5)
  assert len(run["words"]) <= 2 * len(seen) + 1, "what was not seen is joined"


def test_texts_are_explained_one_by_one(service):
  status, _, body = service.ask("POST", "/explain", json.dumps({"texts": ["good"]}))
  assert (status, json.loads(body)["error"]) == (
    400,
    'The body must be {"text": "..."}; texts are explained one by one.',
  )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_in_progress_end(trained, number):
  with serving(trained) as service, contextlib.closing(service.begin(BODY)) as begun:
    idle = service.connect()
    idle.request("GET", "/health")
    idle.getresponse().read()
    _wait_for(lambda: service.metrics()["imdb_jax_requests_in_progress"] == 1)
    service.process.send_signal(number)
    _wait_for(lambda: not _is_open(service.port))
    begun.send(BODY[-1:])
    response = begun.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["class"]
    _, stderr = service.process.communicate(timeout=60)
    assert (service.process.returncode, stderr) == (-number, b"")
    idle.close()


def test_several_runs_answer_with_their_mean(trained):
  with serving(trained, "--with", trained) as service:
    runs = json.loads(service.ask("GET", "/health")[2])["runs"]
    assert [run["run"] for run in runs] == [trained.name] * 2
    # The mean of a run and itself.
    expected = Classifier.load(trained).predict_proba([REVIEW])[0]
    assert list(service.predict(text=REVIEW)["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--host", "256.1.1.1"), "--host 256.1.1.1 --port 8000:"),
    (("--port", "99999"), "--port 99999: must be from 0 to 65535"),
    (("--port", "http"), "--port"),
    (("--host", "a" * 100), "--host aaaaa"),
  ],
)
def test_addresses_that_cannot_be_had_are_refused(trained, arguments, words, call):
  assert_one_clear_line(call("serve", trained, "--platform", "cpu", *arguments), 2, words)


def test_a_port_in_use_is_refused_before_the_run_is_loaded(tmp_path, call):
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    assert_one_clear_line(call("serve", tmp_path, "--port", str(port)), 2, f"--port {port}", "already in use")


def test_a_folder_that_is_no_run_is_refused(tmp_path, call):
  assert_one_clear_line(call("serve", tmp_path, "--platform", "cpu", "--port", "0"), 2, str(tmp_path))


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_extra_is_named(trained, missing, monkeypatch, call):
  monkeypatch.delitem(sys.modules, "imdb_jax.serving.service")
  monkeypatch.delattr("imdb_jax.serving.service")
  for module in [name for name in sys.modules if name.split(".")[0] == missing]:
    monkeypatch.delitem(sys.modules, module)
  monkeypatch.setitem(sys.modules, missing, None)
  assert_one_clear_line(call("serve", trained), 2, "pip install 'imdb_jax[serve]'", missing)


def _is_open(port: int) -> bool:
  try:
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
  except OSError:
    return False
  return True


def _wait_for(condition) -> None:
  give_up_at = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < give_up_at
    time.sleep(0.05)
