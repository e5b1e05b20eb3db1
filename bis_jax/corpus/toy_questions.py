"""The questions of the embedded corpus: what is in the picture, what is asked, how steps read.

A tile scores the number of its stripes, and a question adds up one tile of each panel; a step notes
the score of one panel. The panels of a scene have different scores, and a wrong note is one of the
scores that are left (or, in the harder sources, that of another panel): right and wrong notes are
alike in text, so that only the picture tells them apart.
"""

import dataclasses
import random
from collections.abc import Callable

from bis_jax.corpus.toy_pictures import INKS, MOST_STRIPES, SIDE, Panel
from bis_jax.corpus.toy_policy import Habits

SCORES = ("one", "two", "three", "four", "five", "six")

# The panels of each picture of a scene.
Scene = tuple[tuple[Panel, ...], ...]


@dataclasses.dataclass(frozen=True)
class Source:
  """One annotation file.

  benchmark: the data_source under which the benchmark has this kind of question.
  share: of the corpus's rollouts; the shares of all sources sum to 1.
  scene: draws what is in the pictures.
  question: what is asked, with {start} where something is taken away.
  pictures: how many pictures a scene has.
  sign: 1 where scores are added, -1 where they are taken away.
  result: how a step ends, with {total}.
  """

  name: str
  benchmark: str
  share: float
  habits: Habits
  scene: Callable[[random.Random], Scene]
  question: str
  pictures: int = 1
  sign: int = 1
  result: str = "total {total}"


@dataclasses.dataclass(frozen=True)
class Question:
  """One question about one scene: the parts that the policy and the text need.

  panels: all panels of the scene, in the order in which solutions look at them.
  start, sign: the answer is start + sign * the sum of the panels' scores.
  """

  text: str
  panels: tuple[Panel, ...]
  start: int
  sign: int

  @property
  def answer(self) -> int:
    """The true one."""
    return self.start + self.sign * sum(panel.stripes for panel in self.panels)


def ask(rng: random.Random, source: Source, scene: Scene) -> Question:
  """Returns the source's question about a scene, its panels in random order."""
  panels = [panel for picture in scene for panel in picture]
  rng.shuffle(panels)
  # Nothing less than 0 is left, whatever is noted.
  start = MOST_STRIPES * len(panels) + rng.randrange(10) if source.sign < 0 else 0
  text = f"A tile scores its stripes. {source.question.format(start=start)}"
  return Question(text, tuple(panels), start, source.sign)


def fact(panel: Panel, score: int) -> str:
  """Returns a sentence, without its end, that notes a score of 1 to 6 for a panel."""
  return f"The {panel.name} scores {SCORES[score - 1]}"


def _draw_scores(rng: random.Random, count: int) -> list[int]:
  return rng.sample(range(1, MOST_STRIPES + 1), count)


def _halves(rng: random.Random) -> Scene:
  half = SIDE // 2
  left, right = _draw_scores(rng, 2)
  return (
    (
      Panel("left half", left, "white", 0, 0, SIDE, half),
      Panel("right half", right, "white", 0, half, SIDE, half),
    ),
  )


def _quarters(rng: random.Random) -> Scene:
  half = SIDE // 2
  names = ("top left", "top right", "bottom left", "bottom right")
  places = [(row, column) for row in (0, half) for column in (0, half)]
  scores = _draw_scores(rng, len(names))
  panels = zip(names, scores, places, strict=True)
  return (tuple(Panel(name, score, "white", *place, half, half) for name, score, place in panels),)


def _rows(rng: random.Random) -> Scene:
  names = ("first row", "second row", "third row", "last row")
  panels = enumerate(zip(names, _draw_scores(rng, SIDE), strict=True))
  return (tuple(Panel(name, score, "white", row, 0, 1, SIDE) for row, (name, score) in panels),)


def _columns(rng: random.Random) -> Scene:
  names = ("first column", "second column", "third column", "last column")
  panels = enumerate(zip(names, _draw_scores(rng, SIDE), strict=True))
  return (tuple(Panel(name, score, "white", 0, i, SIDE, 1) for i, (name, score) in panels),)


def _halves_of_two(rng: random.Random) -> Scene:
  half = SIDE // 2
  scores = iter(_draw_scores(rng, 4))
  return tuple(
    tuple(
      Panel(f"{side} half of picture {number}", next(scores), "white", 0, column, SIDE, half)
      for side, column in (("left", 0), ("right", half))
    )
    for number in (1, 2)
  )


def _bars(rng: random.Random) -> Scene:
  count = rng.randint(4, 5)
  length = SIDE // 2
  slots = [(row, column) for row in range(SIDE) for column in (0, length)]
  inks, places = rng.sample(tuple(INKS), count), rng.sample(slots, count)
  panels = zip(inks, _draw_scores(rng, count), places, strict=True)
  return (
    tuple(Panel(f"{ink} bar", score, ink, *place, 1, length) for ink, score, place in panels),
  )


SOURCES = (
  Source(
    name="halves_sum",
    benchmark="DynaMath",
    share=0.25,
    habits=Habits(slip=0.03, again=0.002, lapse=0.15, preface=0.02),
    scene=_halves,
    question="Add up a tile of each half.",
  ),
  Source(
    name="quarters_sum",
    benchmark="WeMath",
    share=0.2,
    habits=Habits(slip=0.02, again=0.002, lapse=0.1, preface=0.05),
    scene=_quarters,
    question="Add up a tile of each quarter.",
  ),
  Source(
    name="rows_sum",
    benchmark="WeMath",
    share=0.15,
    habits=Habits(slip=0.02, again=0.01, lapse=0.03, preface=0.05),
    scene=_rows,
    question="Add up a tile of each row.",
  ),
  Source(
    name="columns_left",
    benchmark="MathVision",
    share=0.15,
    habits=Habits(slip=0.025, mix_up=0.1, again=0.01, lapse=0.03),
    scene=_columns,
    question="Start with {start} and take away a tile of each column.",
    sign=-1,
    result="{total} left",
  ),
  Source(
    name="halves_pair",
    benchmark="MMMU",
    share=0.05,
    habits=Habits(slip=0.025, mix_up=0.1, again=0.01, lapse=0.03),
    scene=_halves_of_two,
    pictures=2,
    question="Add up a tile of each half.",
  ),
  Source(
    name="bars_sum",
    benchmark="MathVerse_VO",
    share=0.2,
    habits=Habits(slip=0.025, mix_up=0.1, again=0.02, lapse=0.05),
    scene=_bars,
    question="Add up a tile of each bar.",
  ),
)
