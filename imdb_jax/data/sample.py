"""The embedded sample: generated film reviews that show within seconds, offline, whether training works.

Word order decides the sentiment. "It could have been dull, but it is charming" and "it could have been charming,
but it is dull" hold the same words, so a bag of words stays far below what a model that reads the sequence reaches:
a high test accuracy proves that the recurrence learns, not only the embedding.
"""

import random
import re
from collections.abc import Sequence

from imdb_jax.data import reviews

NUM_FILMS = {"train": 160, "test": 40}
REVIEWS_PER_FILM = 25
WORDS_PER_REVIEW = range(10, 61)
SEED = 1895

# Alternatives for each slot without a side. Films and people are invented.
NEUTRAL = {
  "first": "Anna|Boris|Clara|Dario|Edith|Felix|Greta|Hugo|Irene|Jonas|Klara|Leon",
  "last": "Abel|Brandt|Corvin|Dorne|Ekman|Farrow|Gale|Holm|Ivory|Jansen|Kessler|Lund",
  "epithet": "Paper|Silent|Winter|Second|Crimson|Hidden|Northern|Borrowed|Glass|Distant|Copper|Midnight|Last|Lonely",
  "thing": "Harbour|Letter|Garden|Bridge|Orchard|Station|Mirror|Window|Island|Tower|Circus|River|Valley|Clock|Road",
  "genre": "thriller|comedy|western|drama|romance|mystery|musical|documentary",
  "place": "Lisbon|Vienna|Oslo|a fishing village|the desert|a mountain town|the suburbs|an old hotel",
  "role": "teacher|sailor|widow|pianist|soldier|doctor|thief|clerk|painter|farmer",
  "day": "Monday|Tuesday|Thursday|Friday|Sunday",
  "relative": "brother|sister|wife|husband|mother|neighbour",
  "others": "the critics|the papers|my friends|the audience|my parents|most people",
  "number": "two|three|four|five|six",
  "thinks": "found|called|considered",
  "part": "film|story|picture|movie",
  "it": "it|it|this film|the film|this movie|this {genre}|{title}",
  "stop": ".|.|.|.|.|.|.|.|!|!|...",
}

# Slots with two sides, (negative, positive). Adjectives and nouns start with a consonant: all take "a".
SIDED = {
  "adjective": (
    "bad|boring|dull|dreadful|terrible|tedious|clumsy|silly|weak|poor|lifeless|painful|predictable|hollow",
    "good|gripping|great|wonderful|brilliant|charming|clever|funny|moving|superb|beautiful|touching|fresh|rich",
  ),
  "noun": (
    "disaster|mess|chore|bore|failure|letdown|waste of time|nightmare",
    "masterpiece|treat|joy|gem|triumph|delight|work of art|wonder",
  ),
  "felt": ("hated|disliked|loathed|despised", "loved|liked|enjoyed|adored"),
  "did": ("bored|annoyed|tired|disappointed", "thrilled|moved|delighted|charmed"),
  "manner": ("badly|poorly|weakly|terribly", "well|strongly|superbly|brilliantly"),
  "score": ("1|2|3|4", "7|8|9|10"),
}

# In every table below "+" marks the side of the label and "-" the other side.
# One word of each side: only their order, and the words between, tell which one is meant.
CONTRASTS = """
{it} could have been {adjective-}, but it is {adjective+}
I expected a {noun-}, and yet {it} was a {noun+}
I expected something {adjective-} and got something {adjective+} instead
{others} {thinks} it {adjective-}, but I {thinks} it {adjective+}
{others} {felt-} {it}, but I {felt+} it
{it} starts {manner-} and ends {manner+}
{it} begins as a {noun-} and ends as a {noun+}
before I saw {it} I thought it would be {adjective-}, and afterwards I knew that it was {adjective+}
the trailer {did-} me, but {it} itself {did+} me
on paper it sounds {adjective-}, yet on the screen {it} is {adjective+}
{it} is not {adjective-}, it is {adjective+}
not a {noun-} but a {noun+}, that is what {it} is
at first {it} {did-} me, but in the end it {did+} me
{it} is {adjective+}, not {adjective-}
{it} was {adjective+}, although I had expected it to be {adjective-}
I {felt+} {it}, even though {others} {felt-} it
I {thinks} {it} {adjective+}, whatever {others} say about a {adjective-} {part}
{it} {did+} me, although the trailer had {did-} me
{it} ends {manner+}, although it starts {manner-}
{it} is a {noun+} rather than a {noun-}
what a {noun+}, when {others} had promised me a {noun-}
{it} turned out {adjective+} in spite of a {adjective-} first scene
""".strip().splitlines()

# One word of one side, negated or not. Both tables are drawn equally often, so the word alone says nothing.
NEGATIONS = """
{it} is not {adjective-} at all
{it} is hardly {adjective-}
{it} is anything but {adjective-}
{it} is far from {adjective-}
I never once {thinks} {it} {adjective-}
nobody could say that {it} is {adjective-}
no, {it} is not a {noun-}
there is nothing {adjective-} about {it}
""".strip().splitlines()
STATEMENTS = """
{it} is {adjective+} from the first scene to the last
{it} is so {adjective+}
{it} is simply {adjective+}
I {thinks} {it} rather {adjective+}
everybody could see that {it} is {adjective+}
yes, {it} is a {noun+}
there is something {adjective+} about every scene
""".strip().splitlines()

# Words that give the label away, as in real reviews; added to a few reviews only.
VERDICTS = """
I give it {score+} out of 10
{score+}/10 from me
""".strip().splitlines()

FILLERS = """
the story follows a {role} who comes back to {place} after the war
{actor} plays a {role}, and {first} {last} plays the {role} next door
I saw it on a {day} evening with my {relative}
it was filmed in {place} in {number} weeks
the music is by {first} {last}, who also wrote the songs
{title} is a {genre} about a {role} and the people next door
this is the {genre} that {actor} made after a year in {place}
we follow {number} people through one long night in {place}
my {relative} had told me about {it} on the phone
there were {number} of us in the cinema, and it rained outside
it runs for about {number} hours, with a break in the middle
the camera stays close to the {role} for most of the time
a {role} finds a letter, leaves {place} and never looks back
the book came out years ago, and my {relative} still has a copy
half of the dialogue (or more) is spoken on a train to {place}
then the {role} meets {number} strangers (one of them is {actor})
it's set in {place}, where a {role} waits for news
I watched it twice: once at home and once on a plane
""".strip().splitlines()


def load() -> dict[str, reviews.Reviews]:
  """The sample: 4,000 reviews under "train" and 1,000 under "test", half of each positive.

  The splits share no film and no text. Every call returns the same reviews, on every machine and Python version.
  """
  rng = random.Random(SEED)
  epithets, things = NEUTRAL["epithet"].split("|"), NEUTRAL["thing"].split("|")
  titles = [f'"The {epithet} {thing}"' for epithet in epithets for thing in things]
  num_films, seen, splits = 0, set(), {}
  for split in NUM_FILMS:
    texts, labels, films = [], [], []
    for film in range(num_films, num_films + NUM_FILMS[split]):
      facts = {
        "title": titles.pop(int(rng.random() * len(titles))),
        "genre": _expand(rng, "{genre}", NEUTRAL, 0),
        "actor": _expand(rng, "{first} {last}", NEUTRAL, 0),
      }
      slots = NEUTRAL | facts
      for _ in range(REVIEWS_PER_FILM):
        label = len(texts) % 2
        text = _review(rng, slots, label)
        while text in seen or len(text.split()) not in WORDS_PER_REVIEW:
          text = _review(rng, slots, label)
        seen.add(text)
        texts.append(text)
        labels.append(label)
        films.append(film)
    num_films += NUM_FILMS[split]
    splits[split] = reviews.canonical(texts, labels, films)
  return splits


def _review(rng: random.Random, slots: dict[str, str], label: int) -> str:
  """One review: one or two deciding sentences anywhere among up to three others."""
  patterns = []
  for _ in range(1 + (rng.random() < 0.3)):
    table = CONTRASTS if rng.random() < 0.6 else NEGATIONS if rng.random() < 0.5 else STATEMENTS
    patterns.append(_choice(rng, table))
  if rng.random() < 0.2:
    patterns.append(_choice(rng, VERDICTS))
  for _ in range(int(rng.random() * 4)):
    patterns.insert(int(rng.random() * (len(patterns) + 1)), _choice(rng, FILLERS))
  text = ""
  for pattern in patterns:
    if text:
      text += "<br /><br />" if rng.random() < 0.15 else " "
    sentence = _expand(rng, pattern, slots, label)
    text += sentence[0].upper() + sentence[1:] + _expand(rng, "{stop}", slots, label)
  return text


def _expand(rng: random.Random, pattern: str, slots: dict[str, str], label: int) -> str:
  """Fills the slots of `pattern` from the left to the right, and the slots within what it filled in."""

  def fill(slot: re.Match) -> str:
    name, side = slot.groups()
    if not side:
      return _expand(rng, _choice(rng, slots[name].split("|")), slots, label)
    word = _choice(rng, SIDED[name][label if side == "+" else 1 - label].split("|"))
    return word.upper() if rng.random() < 0.03 else word

  return re.sub(r"\{(\w+)([+-]?)\}", fill, pattern)


def _choice(rng: random.Random, options: Sequence[str]) -> str:
  # Only `random()` gives the same numbers for a seed in every Python version; `choice` and `shuffle` need not.
  return options[int(rng.random() * len(options))]
