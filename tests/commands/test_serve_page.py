"""The page of `serve`, in a real browser; skipped where there is none."""

import contextlib
import dataclasses
import json
import re
import threading
import types
from pathlib import Path

import pytest
import uvicorn
from browser import CHROMEDRIVER, CHROMIUM, Browser
from serving import serving

from imdb_jax.explanation import Explanation, Word
from imdb_jax.serving import service as service_lib

INJECTION = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"

# The lowest contrast between a word and its color, as in WCAG 2.1.
CONTRAST = """
const numbers = color => color.match(/[\\d.]+/g).map(Number);
const luminance = rgb => rgb.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const page = numbers(getComputedStyle(document.body).backgroundColor);
return Math.min(...[...document.querySelectorAll("#explained *")].map(each => {
  const style = getComputedStyle(each), [r, g, b, alpha = 1] = numbers(style.backgroundColor);
  const back = luminance([r, g, b].map((x, i) => alpha * x + (1 - alpha) * page[i]));
  const text = luminance(numbers(style.color));
  return (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05);
}));
"""

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs Chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def browser():
  with contextlib.closing(Browser()) as browser:
    yield browser


@pytest.fixture(scope="module")
def service(trained):
  with serving(trained) as service:
    yield service


class Hostile:
  """An ensemble of one run, and that run. Its classes and its name are HTML."""

  classes = (INJECTION, "__proto__", *map(str, range(20)))
  step = 1_234
  # A name may hold anything except a slash.
  config = types.SimpleNamespace(run_dir=Path(INJECTION.replace("/", "")))

  def answers(self, texts):
    if "fail" in texts:
      raise ValueError("as the test wants")
    probabilities = dict(zip(self.classes, [0.5, 0.3, *[0.01] * 20], strict=True))
    return [{"class": INJECTION, "probabilities": probabilities, "known_words": len(text.split())} for text in texts]

  def explain(self, texts):
    words = tuple(Word(each[0], each.start(), each.end(), None) for each in re.finditer(r"\S+", texts[0]))
    words = (*words[:-1], dataclasses.replace(words[-1], contribution=1.5))
    return [Explanation(text="", label=INJECTION, logit=0.0, baseline_logit=0.0, words=words, error=0.0, change=0.0)]

  def __init__(self):
    self.classifiers = (self,)


@contextlib.contextmanager
def hostile_service(port: int = 0):
  """Run a service with a hostile classifier in a thread, and yield its port."""
  app = service_lib.Service(Hostile()).app
  server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", lifespan="off"))
  listener = service_lib.listen("127.0.0.1", port)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
  thread.start()
  try:
    yield listener.getsockname()[1]
  finally:
    server.should_exit = True
    thread.join()


def test_the_answer_follows_while_typing(browser, service):
  browser.open(service.url)
  assert browser.text("#class") == ""
  for text in ("A good film", " and a bad one"):
    browser.type(text)
    known_words = service.predict(text=browser.script("return document.querySelector('textarea').value"))["known_words"]
    browser.wait("#words", f"{known_words} words of the text known to the model")
  answer = service.predict(text="A good film and a bad one")
  shown = browser.text("#class")
  assert shown == f"{answer['class']}, {100 * answer['probabilities'][answer['class']]:.1f}%"
  # Announced once, after a pause.
  assert browser.wait("#status", shown).endswith("known to the model")
  names = browser.script("return [...document.querySelectorAll('li span:first-child')].map(each => each.textContent)")
  assert names == sorted(answer["probabilities"], key=lambda name: -answer["probabilities"][name])
  browser.script("document.querySelector('textarea').value = ''")
  browser.type("zzzz")
  browser.wait("#words", "no word")
  assert (browser.text("#class"), browser.text("ul")) == ("No answer", "")
  assert browser.text("#run").startswith("Run run, step ")
  assert browser.console() == []


def test_words_are_colored_by_their_contribution(browser, service):
  """Colors, and the same in words. The places are right behind a character of two UTF-16 units."""
  text = "\U0001f3ac I was <br /> zzzz bad; a great film"
  browser.open(service.url)
  browser.type(text.replace("\U0001f3ac", "x"))
  browser.wait("#explained", "great")
  browser.script(f"document.querySelector('textarea').value = {json.dumps(text)}")
  browser.script("document.querySelector('textarea').dispatchEvent(new Event('input'))")
  browser.wait("#explained", "\U0001f3ac")
  assert browser.text("#explained p.explained") == text
  (run,) = json.loads(service.ask("POST", "/explain", json.dumps({"text": text}))[2])["runs"]
  spans = "[...document.querySelectorAll('#explained .explained span')]"
  shown = browser.script(f"return {spans}.map(each => [each.textContent, each.title, each.style.backgroundColor])")
  for (word, title, color), expected in zip(shown, run["words"], strict=True):
    contribution = expected["contribution"]
    assert word == text[expected["start"] : expected["end"]]
    if contribution is None:
      assert (title, color) == ("not seen", "")
    else:
      assert title == f"{contribution:+.2f}".replace("-", "\u2212")
      assert color.startswith("rgba(0, 114, 178" if contribution > 0 else "rgba(213, 94, 0")
  main = min(run["words"], key=lambda word: word["contribution"] or 0)
  assert f"Orange, against positive: {text[main['start'] : main['end']]} (" in browser.text("#explained")
  assert "Dotted: not seen by the model." in browser.text("#explained")
  assert browser.script(CONTRAST) > 4.5
  browser.script("document.querySelector('textarea').value = ''")
  browser.type("zzzz")
  browser.wait("#class", "No answer")
  assert browser.text("#explained") == ""
  assert browser.console() == []


def test_several_runs_are_shown_side_by_side(browser, trained, other_run):
  with serving(trained, "--with", other_run) as service:
    for width, is_beside in ((1200, True), (360, False)):
      browser.open(service.url, width=width)
      browser.type("An excellent film")
      browser.wait("#explained", f"Run {other_run.name}: positive, ")
      places = "return [...document.querySelectorAll('#explained h2')].map(each => each.getBoundingClientRect().top)"
      first, second = browser.script(places)
      assert (first == second) == is_beside
      assert browser.script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_both_schemes(browser, service, scheme):
  browser.open(service.url, width=360, height=740, scheme=scheme)
  browser.type("A good film " + "without_any_space" * 20)
  browser.wait("#class", "%")
  browser.wait("#explained", "good")
  assert not browser.script("const page = document.documentElement; return page.scrollWidth > page.clientWidth")
  assert browser.script(CONTRAST) > 4.5
  colors = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
  text, back = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in browser.script(colors))
  assert (text < back) == (scheme == "light")
  assert abs(text - back) > 500


def test_the_page_works_with_keys_and_names_its_parts(browser, service):
  browser.open(service.url)
  assert browser.active(path="/computedlabel") == "Your text"
  assert browser.active(path="/computedrole") == "textbox"
  browser.type("\ue004")
  assert browser.active(path="/text") == "OpenAPI description"
  roles = {"#status": "status", "#problem": "alert", "#answer": "region", "#probabilities": "list"}
  for selector, role in roles.items():
    found = browser.do("POST", "/element", {"using": "css selector", "value": selector})
    (element,) = found.values()
    if selector != "#problem":
      assert browser.do("GET", f"/element/{element}/computedrole") == role, selector
    assert browser.script(f"return document.querySelector('{selector}').id") == selector[1:]


def test_texts_and_names_are_never_html(browser):
  with hostile_service() as port:
    browser.open(f"http://127.0.0.1:{port}/")
    browser.type(INJECTION)
    browser.wait("#class", f"{INJECTION}, 50.0%")
    browser.wait("#run", f"Run {INJECTION.replace('/', '')}, step 1,234.")
    assert INJECTION in browser.wait("#explained", INJECTION)
    assert browser.text("#explained h2") == f"Run {INJECTION.replace('/', '')}: {INJECTION}, 50.0%"
    assert browser.script("return document.querySelectorAll('main img, main script').length") == 0
    # The ten most probable of 22 classes.
    assert (
      browser.script("return [...document.querySelectorAll('li')].map(each => each.innerText)")[1] == "__proto__\n30.0%"
    )
    assert browser.script("return document.querySelectorAll('li').length") == 10
    # The policy also stops what gets into the page by another way.
    blocked = "try { document.body.innerHTML = '<p>'; } catch (error) { return error.name; }"
    assert browser.script(blocked) == "TypeError"
    assert browser.script("return document.title") == "Try the model"


def test_problems_are_shown_and_a_restarted_service_is_found_again(browser):
  with hostile_service() as port:
    browser.open(f"http://127.0.0.1:{port}/")
    browser.type("fail")
    browser.wait("#problem", "The prediction failed; the log of the service says why.")
    browser.type("s")
    browser.wait("#class", "50.0%")
    assert browser.text("#problem") == ""
  browser.type("s")
  browser.wait("#problem", "does not answer")
  with hostile_service(port):
    browser.wait("#class", "50.0%")
    assert browser.text("#problem") == ""


def test_long_texts_are_pasted(browser):
  with hostile_service() as port:
    browser.open(f"http://127.0.0.1:{port}/")
    for text, selector, words in (
      ("'word '.repeat(2e4)", "#words", "20,000 words"),
      ("'a'.repeat(5e6)", "#problem", "more than 4,194,304 bytes"),
    ):
      browser.script(f"document.querySelector('textarea').value = {text}")
      browser.script("document.querySelector('textarea').dispatchEvent(new Event('input'))")
      browser.wait(selector, words)
      if selector == "#words":
        browser.wait("#explained", "99,794 characters")


def test_the_page_names_no_other_host(service):
  page = service.ask("GET", "/")[2].decode()
  assert not re.search(r"https?:|(src|href)=\"//|@import|url\(", page)
