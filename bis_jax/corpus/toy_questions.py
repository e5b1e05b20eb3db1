"""The questions of the embedded corpus: what is in the picture, what is asked, how steps read.

A source asks about `things`, each with a name that is seen in the picture once (a frame's colour or
a shape) and a value (a digit, a colour, a count). Values are uniform and a wrong note is uniform
over the other values, so text alone never tells a right step from a wrong one.
"""

import dataclasses
import random
from collections.abc import Callable

from bis_jax.corpus.toy_pictures import COLOURS, DIGITS, SHAPES, SIDE, Card
from bis_jax.corpus.toy_policy import Habits

_COLOURS = tuple(COLOURS)
_COUNTS = tuple(str(count) for count in range(SIDE + 1))


@dataclasses.dataclass(frozen=True)
class Scene:
  """The pictures of one question group before anything is asked.

  names, values: what is there to be asked about; `values` index the source's values.
  target: what the whole scene is about, where a question needs it; else "".
  """

  pictures: tuple[tuple[Card, ...], ...]
  names: tuple[str, ...]
  values: tuple[int, ...]
  target: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
  """One annotation file.

  benchmark: the data_source under which the benchmark has this kind of question.
  share: of the corpus's rollouts; the shares of all sources sum to 1.
  pictures: how many pictures a scene has.
  values: the words for a value.
  things: least and most things a question asks about.
  cards: least and most cards in all pictures, where scenes differ in that.
  scene: draws what is in the pictures, from a generator and a number of cards.
  fact: a true or false sentence about a thing, with {name}, {value} and, if needed, {target}.
  question: with {names}, and {start}, {points} or {target} where needed.
  result: how a step ends, with {total}.
  worth: what each value counts for; () means that every question has a price list of its own.
  """

  name: str
  benchmark: str
  share: float
  habits: Habits
  values: tuple[str, ...]
  things: tuple[int, int]
  cards: tuple[int, int]
  scene: Callable[[random.Random, int], Scene]
  fact: str
  question: str
  worth: tuple[int, ...]
  result: str = "total {total}"
  pictures: int = 1


@dataclasses.dataclass(frozen=True)
class Question:
  """One question about one scene: the parts that the policy and the text need.

  names: the things' names, as listed in the text.
  things: indices into the scene's names.
  start, worth: the answer is start + sum of worth[value] over the things.
  """

  text: str
  names: str
  things: tuple[int, ...]
  start: int
  worth: tuple[int, ...]


def ask(rng: random.Random, source: Source, scene: Scene) -> Question:
  """Returns a question about some of the scene's things, in random order."""
  count = min(rng.randint(*source.things), len(scene.names))
  things = tuple(rng.sample(range(len(scene.names)), count))
  names = [scene.names[i] for i in things]
  listed = f"{', '.join(names[:-1])} and {names[-1]}" if count > 1 else names[0]
  worth = source.worth or tuple(rng.sample(range(1, len(source.values) + 1), len(source.values)))
  points = ", ".join(f"{v} {w}" for v, w in zip(source.values, worth, strict=True))
  # Nothing less than 0 is left, whatever is noted.
  start = max(0, -min(worth)) * count + (rng.randrange(10) if min(worth) < 0 else 0)
  text = source.question.format(names=listed, start=start, points=points, target=scene.target)
  return Question(text, listed, things, start, worth)


def _cells(rng: random.Random, count: int) -> list[tuple[int, int]]:
  return [divmod(cell, SIDE) for cell in rng.sample(range(SIDE * SIDE), count)]


def digit_cards(rng: random.Random, cards: int) -> Scene:
  """Returns cards of different colours, each with a digit."""
  names = rng.sample(_COLOURS, cards)
  values = [rng.randrange(len(DIGITS)) for _ in names]
  picture = [
    Card(*cell, name, DIGITS[value])
    for cell, name, value in zip(_cells(rng, cards), names, values, strict=True)
  ]
  return Scene((tuple(picture),), tuple(names), tuple(values))


def digit_card_pair(rng: random.Random, cards: int) -> Scene:
  """Returns two pictures that share the cards of `digit_cards` out between them."""
  scene = digit_cards(rng, cards)
  (picture,) = scene.pictures
  return dataclasses.replace(scene, pictures=(picture[: cards // 2], picture[cards // 2 :]))


def shape_cards(rng: random.Random, cards: int) -> Scene:
  """Returns cards with different shapes, each in one of five colours."""
  names = rng.sample(SHAPES, cards)
  values = [rng.randrange(len(SHAPE_COLOURS)) for _ in names]
  picture = [
    Card(*cell, SHAPE_COLOURS[value], name)
    for cell, name, value in zip(_cells(rng, cards), names, values, strict=True)
  ]
  return Scene((tuple(picture),), tuple(names), tuple(values))


def shelves(rng: random.Random, cards: int) -> Scene:
  """Returns `cards` / 4 rows of cards, a colour each, with 0 to 4 cards of the target shape."""
  names = rng.sample(_COLOURS, cards // SIDE)
  target, *others = rng.sample(SHAPES, 3)
  rows = rng.sample(range(SIDE), len(names))
  picture, values = [], []
  for row, name in zip(rows, names, strict=True):
    count = rng.randrange(len(_COUNTS))
    glyphs = [target] * count + [rng.choice(others) for _ in range(SIDE - count)]
    rng.shuffle(glyphs)
    picture += [Card(row, column, name, glyph) for column, glyph in enumerate(glyphs)]
    values.append(count)
  return Scene((tuple(picture),), tuple(names), tuple(values), target)


SHAPE_COLOURS = ("red", "yellow", "green", "blue", "purple")
SOURCES = (
  Source(
    name="card_sum",
    benchmark="DynaMath",
    share=0.3,
    habits=Habits(slip=0.02, again=0.01),
    values=DIGITS,
    things=(3, 4),
    cards=(3, 4),
    scene=digit_cards,
    fact="The {name} card shows {value}",
    question="Add the numbers on the {names} cards.",
    worth=tuple(range(1, 10)),
  ),
  Source(
    name="shape_points",
    benchmark="WeMath",
    share=0.25,
    habits=Habits(slip=0.02, again=0.01, lapse=0.01),
    values=SHAPE_COLOURS,
    things=(3, 6),
    cards=(4, 6),
    scene=shape_cards,
    fact="The {name} is {value}",
    question="Points: {points}. Add up the {names}.",
    worth=(),
  ),
  Source(
    name="card_left",
    benchmark="MathVision",
    share=0.25,
    habits=Habits(slip=0.025, mix_up=0.3, again=0.02, lapse=0.02),
    values=DIGITS,
    things=(4, 6),
    cards=(6, 8),
    scene=digit_cards,
    fact="The {name} card shows {value}",
    question="Start with {start} and take away the numbers on the {names} cards.",
    result="{total} left",
    worth=tuple(-digit for digit in range(1, 10)),
  ),
  Source(
    name="card_pair",
    benchmark="MMMU",
    share=0.05,
    habits=Habits(slip=0.025, mix_up=0.3, again=0.02, lapse=0.02),
    values=DIGITS,
    things=(4, 6),
    cards=(6, 8),
    scene=digit_card_pair,
    pictures=2,
    fact="The {name} card shows {value}",
    question="Add the numbers on the {names} cards of both pictures.",
    worth=tuple(range(1, 10)),
  ),
  Source(
    name="shelf_count",
    benchmark="MathVerse_VO",
    share=0.15,
    habits=Habits(slip=0.04, again=0.04, lapse=0.05),
    values=_COUNTS,
    things=(2, 4),
    cards=(12, 16),
    scene=shelves,
    fact="The {name} shelf has the {target} {value} times",
    question="How many times is the {target} on the {names} shelves?",
    worth=tuple(range(SIDE + 1)),
  ),
)
