"""The questions of the toy corpus: scenes, questions and the wording of steps.

The score of a tile is its number of stripes, and a question adds up one tile of each panel; a step
notes the score of one panel. The panels of a scene have different scores, and a wrong note is one of
the remaining scores (or, in the harder sources, that of another panel). So the text of right and
wrong notes is alike, and only the picture distinguishes them.

With `Kinds`, a tile has one of many random patterns instead, and the score of each has to be learned
from steps, of which there are more for some kinds than for others.
"""

import dataclasses
import functools
import random

from bis_jax.toy.pictures import INKS, MOST_STRIPES, SIDE, Panel
from bis_jax.toy.policies import Habits

_ALL_SCORES = range(1, MOST_STRIPES + 1)
SCORES = ("one", "two", "three", "four", "five", "six")

# The panels of each picture of a scene.
Scene = tuple[tuple[Panel, ...], ...]
# The panels of a picture: name, first row, first column, rows, columns, in tiles.
Layout = tuple[tuple[str, int, int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Kinds:
  """`number` kinds of tile from `first` on, both multiples of 6: each score has as many kinds.

  Of the kinds of a score, the i-th of all is drawn with weight (i + 1)^-exponent.
  """

  first: int = 0
  number: int = 0  # 0: tiles with stripes
  exponent: float = 0.0

  def draw(self, rng: random.Random, score: int) -> int | None:
    if not self.number:
      return None
    kinds = [kind for kind in range(self.first, self.first + self.number) if _score(kind) == score]
    weights = [(kind - self.first + 1) ** -self.exponent for kind in kinds]
    return rng.choices(kinds, weights)[0]


@functools.cache
def _score(kind: int) -> int:
  block, place = divmod(kind, MOST_STRIPES)
  return random.Random(f"kinds {block}").sample(_ALL_SCORES, MOST_STRIPES)[place]


@dataclasses.dataclass(frozen=True)
class Source:
  name: str
  benchmark: str  # the data_source of such questions in the benchmark
  share: float  # of the corpus's rollouts; all shares sum to 1
  habits: Habits
  unit: str  # what the question calls a panel
  layout: Layout = ()  # empty: bars of different inks
  pictures: int = 1  # in a scene
  sign: int = 1  # -1 if scores are subtracted

  def scene(self, rng: random.Random, kinds: Kinds) -> Scene:
    return _laid_out(self.layout, rng, self.pictures, kinds) if self.layout else _bars(rng, kinds)

  def result(self, total: int) -> str:
    return f"{total} left" if self.sign < 0 else f"total {total}"


@dataclasses.dataclass(frozen=True)
class Question:
  """One question about one scene; its answer is start + sign * the sum of the panels' scores."""

  text: str
  panels: tuple[Panel, ...]  # in the order in which solutions look at them
  start: int
  sign: int

  @property
  def answer(self) -> int:
    return self.start + self.sign * sum(panel.score for panel in self.panels)


def ask(rng: random.Random, source: Source, scene: Scene) -> Question:
  panels = [panel for picture in scene for panel in picture]
  rng.shuffle(panels)
  start, task = 0, "Add up"
  if source.sign < 0:
    # The result is never negative, regardless of what is noted.
    start = MOST_STRIPES * len(panels) + rng.randrange(10)
    task = f"Start with {start} and take away"
  scored = "its stripes" if panels[0].kind is None else "by its kind"
  text = f"A tile scores {scored}. {task} a tile of each {source.unit}."
  return Question(text, tuple(panels), start, source.sign)


def fact(panel: Panel, score: int) -> str:
  """Returns a sentence, without its full stop, that notes a score of 1 to 6 for a panel."""
  return f"The {panel.name} scores {SCORES[score - 1]}"


_HALF = SIDE // 2
_HALVES: Layout = (("left half", 0, 0, SIDE, _HALF), ("right half", 0, _HALF, SIDE, _HALF))
_QUARTERS: Layout = (
  ("top left", 0, 0, _HALF, _HALF),
  ("top right", 0, _HALF, _HALF, _HALF),
  ("bottom left", _HALF, 0, _HALF, _HALF),
  ("bottom right", _HALF, _HALF, _HALF, _HALF),
)
_ORDINALS = ("first", "second", "third", "last")
_ROWS: Layout = tuple((f"{nth} row", i, 0, 1, SIDE) for i, nth in enumerate(_ORDINALS))
_COLUMNS: Layout = tuple((f"{nth} column", 0, i, SIDE, 1) for i, nth in enumerate(_ORDINALS))


def _laid_out(layout: Layout, rng: random.Random, pictures: int, kinds: Kinds) -> Scene:
  """Returns a scene of white panels; names say of which picture if there are several."""
  scores = iter(rng.sample(_ALL_SCORES, pictures * len(layout)))
  of = [f" of picture {number + 1}" if pictures > 1 else "" for number in range(pictures)]
  return tuple(
    tuple(
      Panel(name + suffix, (score := next(scores)), "white", *place, kind=kinds.draw(rng, score))
      for name, *place in layout
    )
    for suffix in of
  )


def _bars(rng: random.Random, kinds: Kinds) -> Scene:
  count = rng.randint(4, 5)
  slots = [(row, column) for row in range(SIDE) for column in (0, _HALF)]
  inks, places = rng.sample(tuple(INKS), count), rng.sample(slots, count)
  panels = zip(inks, rng.sample(_ALL_SCORES, count), places, strict=True)
  return (
    tuple(
      Panel(f"{ink} bar", score, ink, *place, 1, _HALF, kind=kinds.draw(rng, score))
      for ink, score, place in panels
    ),
  )


SOURCES = (
  Source(
    name="halves_sum",
    benchmark="DynaMath",
    share=0.25,
    habits=Habits(slip=0.03, again=0.002, lapse=0.15, preface=0.02),
    layout=_HALVES,
    unit="half",
  ),
  Source(
    name="quarters_sum",
    benchmark="WeMath",
    share=0.2,
    habits=Habits(slip=0.02, again=0.002, lapse=0.1, preface=0.05),
    layout=_QUARTERS,
    unit="quarter",
  ),
  Source(
    name="rows_sum",
    benchmark="WeMath",
    share=0.15,
    habits=Habits(slip=0.02, again=0.01, lapse=0.03, preface=0.05),
    layout=_ROWS,
    unit="row",
  ),
  Source(
    name="columns_left",
    benchmark="MathVision",
    share=0.15,
    habits=Habits(slip=0.025, mix_up=0.1, again=0.01, lapse=0.03),
    layout=_COLUMNS,
    unit="column",
    sign=-1,
  ),
  Source(
    name="halves_pair",
    benchmark="MMMU",
    share=0.05,
    habits=Habits(slip=0.025, mix_up=0.1, again=0.01, lapse=0.03),
    layout=_HALVES,
    pictures=2,
    unit="half",
  ),
  Source(
    name="bars_sum",
    benchmark="MathVerse_VO",
    share=0.2,
    habits=Habits(slip=0.025, mix_up=0.1, again=0.02, lapse=0.05),
    unit="bar",
  ),
)
