"""Compares statistics of the toy corpus with those known of the released one.

  python -m benchmarks.study.corpus_statistics [slip=2.0 recovery=1.5 ...]

Draws the corpus of the toy recipe, with other settings of `config.corpus.toy` if given, and prints its
statistics; "-" if the release's description does not state one. Results: docs/study.md.
"""

import collections
import dataclasses
import json
import pathlib
import sys

import numpy as np

from bis_jax.settings import locations
from bis_jax.toy import drawing
from configs import common

# Of VisualPRM400K-v1.1-Raw; the other lines are not stated.
RELEASED = {
  "rollouts": "565,149",
  "steps per rollout, mean": "5.6",
  "steps per rollout, most": "about 16",
  "words per step but the last, median": "24",
  "words per step but the last, mean": "30",
  "rollouts whose last step scores > 0.5": "89.2 %",  # 503,885
  "rollouts per question and picture": "about 3",
  "continuations per step": "16",
}
_EDGES = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # a bin is (low, high]; 0 and 1 have bins of their own


@dataclasses.dataclass(frozen=True)
class Steps:
  """All steps of a corpus, concatenated.

  rollout: int64, index of the rollout, non-decreasing from 0.
  score: float64, MC scores.
  measured: bool, has continuations.
  right: bool, the truth.
  words: int64, length of the text.
  """

  rollout: np.ndarray
  score: np.ndarray
  measured: np.ndarray
  right: np.ndarray
  words: np.ndarray

  def count(self, which: np.ndarray) -> np.ndarray:
    """Returns how many steps of every rollout are in `which` (bool[steps])."""
    return np.bincount(self.rollout[which], minlength=self.rollout[-1] + 1)


def main(*settings: str) -> None:
  """Draws the corpus with settings given as NAME=VALUE, and prints the table."""
  c = common.in_form(common.get_config(), "toy")
  for name, value in (setting.split("=") for setting in settings):
    c.corpus.toy[name] = type(c.corpus.toy[name])(json.loads(value))
  drawn = locations.locate(c).toy
  drawn.parent.mkdir(parents=True, exist_ok=True)
  drawing.draw(drawn, **c.corpus.toy)
  print(f"{'':44}{'released':>10}{'drawn':>10}")
  for name, value in statistics(drawn).items():
    print(f"{name:44}{RELEASED.get(name, '-'):>10}{value:>10}")


def statistics(drawn: pathlib.Path) -> dict[str, str]:
  """Returns the statistics of a drawn corpus as text."""
  steps, groups, continuations = _read(drawn)
  n = steps.count(steps.rollout >= 0)
  positive = steps.score > 0
  n_pos, wrong = steps.count(positive), ~steps.right
  last = np.append(np.diff(steps.rollout) > 0, True)
  reliability = np.bincount(steps.rollout, steps.score)[n_pos > 0] / n_pos[n_pos > 0]
  return {
    "rollouts": f"{n.size:,}",
    "steps per rollout, mean": f"{n.mean():.2f}",
    "steps per rollout, most": f"{n.max()}",
    "words per step but the last, median": f"{np.median(steps.words[~last]):.0f}",
    "words per step but the last, mean": f"{steps.words[~last].mean():.1f}",
    "rollouts whose last step scores > 0.5": _share(steps.score[last] > 0.5),
    "rollouts per question and picture": f"{groups:.2f}",
    "continuations per step": continuations,
    "steps without continuations": _share(~steps.measured),
    "positive steps": _share(positive),
    "rollouts with steps of both kinds (mixed)": _share((n_pos > 0) & (n_pos < n)),
    "rollouts with positive steps only": _share(n_pos == n),
    "rollouts without a positive step": _share(n_pos == 0),
    "MC score of positive steps, mean": f"{steps.score[positive].mean():.3f}",
    "reliability R where there is one, mean": f"{reliability.mean():.3f}",
    "wrong steps, by truth": _share(wrong),
    "rollouts with a wrong step, by truth": _share(steps.count(wrong) > 0),
    "wrong steps with a positive score": _share(positive[wrong]),
    "right steps with score 0": _share(~positive[steps.right]),
    "labels that are flipped (hard, tau 0)": _share(positive == wrong),
  } | _flips(steps)


def _flips(steps: Steps) -> dict[str, str]:
  """Returns the share of wrong labels by MC score: correct steps at 0, wrong ones above."""
  lines = {"right among steps of score 0": _share(steps.right[steps.score == 0])}
  for low, high in zip(_EDGES, (*_EDGES[1:], 1.0), strict=True):
    here = (steps.score > low) & (steps.score <= high) & (steps.score < 1)
    bracket = ")" if high == 1 else "]"
    lines[f"wrong among steps in ({low:g}, {high:g}{bracket}"] = _share(~steps.right[here])
  return lines | {"wrong among steps of score 1": _share(~steps.right[steps.score == 1])}


def _share(which: np.ndarray) -> str:
  return f"{100 * which.mean():.1f} %" if which.size else "none"


def _read(drawn: pathlib.Path) -> tuple[Steps, float, str]:
  """Returns all steps, mean rollouts per question and picture, and continuations per step."""
  truth = drawing.read_truth(drawn)
  columns, groups, continuations = [], collections.Counter(), set()
  for path in sorted((drawn / "annotations").glob("*.jsonl")):
    for line, record in enumerate(map(json.loads, path.read_text().splitlines())):
      groups[str(record["image"]), record["question_orig"]] += 1
      continuations.add(record["num_mc_sequences"])
      rollout = groups.total() - 1
      for step, right in zip(record["steps_with_score"], truth[path.stem, line], strict=True):
        words = len(step["step"].split())
        columns.append((rollout, step["score"], step["num_mc_total"] > 0, right > 0, words))
  steps = Steps(*map(np.array, zip(*columns, strict=True)))
  return steps, groups.total() / len(groups), ", ".join(map(str, sorted(continuations)))


if __name__ == "__main__":
  main(*sys.argv[1:])
