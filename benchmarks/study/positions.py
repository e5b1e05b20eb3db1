"""How much of a step's label its position predicts, among the rollouts that a run was trained on.

  python -m benchmarks.study.positions RUN [RUN ...]

A wrong solution mostly stays wrong. So in a rollout of five steps with p near 1/2 the first steps are
correct and the last ones wrong, regardless of the picture, and a model trained only on such rollouts
can fit their labels without looking at it. This prints per run the share of mixed rollouts among the
kept ones, and the share of the entropy of the hard labels that source, number of steps and position
predict: 1 - H(label | position) / H(label). Results: docs/study.md.
"""

import json
import pathlib
import sys
from collections.abc import Iterable

import numpy as np
from ml_collections import ConfigDict
from scipy import special

from bis_jax.corpus.corpus import Corpus
from bis_jax.corpus.score_table import positive_and_counted
from bis_jax.selection.manifest import Manifest
from bis_jax.settings import locations

_RUNS = "*_0.1_seed0/evaluation.json"


def share_predicted(place: np.ndarray, label: np.ndarray) -> float:
  """Returns 1 - H(label | place) / H(label), in [0, 1]; 0 if all labels are equal.

  Args:
    place: int[steps], identifies source, number of steps and position.
    label: bool[steps].
  """
  _, cell = np.unique(place, return_inverse=True)
  count = np.bincount(cell)
  whole = _entropy(label.mean())
  within = (count * _entropy(np.bincount(cell, label) / count)).sum() / count.sum()
  return float(1 - within / whole) if whole > 0 else 0.0


def _entropy(p: np.ndarray) -> np.ndarray:
  """Returns the entropy of a label that is true with probability p, in nats."""
  return special.entr(p) + special.entr(1 - p)


def of_run(workdir: pathlib.Path) -> tuple[int, float, float]:
  """Returns the number of a run's kept rollouts, the share of mixed ones, and `share_predicted`."""
  config = ConfigDict(json.loads((workdir / "config.json").read_text()))
  corpus = Corpus.open(locations.locate(config).prepared)
  kept = Manifest.load(workdir / "manifest.json").rollout_indices(corpus)
  places, labels, mixed = [], [], 0
  sources: dict[str, int] = {}
  for index in kept:
    rollout = corpus.rollout(int(index))
    positive, _ = positive_and_counted(
      np.asarray(rollout.scores), np.asarray(rollout.measured), config.corpus.tau, "negative"
    )
    source = sources.setdefault(rollout.source, len(sources))
    n = len(positive)
    places.append((source << 32) + (n << 16) + np.arange(n))
    labels.append(positive)
    mixed += 0 < positive.sum() < n
  return (
    len(kept),
    mixed / len(kept),
    share_predicted(np.concatenate(places), np.concatenate(labels)),
  )


def write(folder: pathlib.Path, parts: Iterable[str]) -> None:
  """Writes folder/positions.json: {"part/run": `of_run`} for the tenths of some parts, seed 0."""
  found = sorted(path.parent for part in parts for path in (folder / part).glob(_RUNS))
  predicted = {f"{workdir.parent.name}/{workdir.name}": of_run(workdir) for workdir in found}
  (folder / "positions.json").write_text(json.dumps(predicted, indent=1) + "\n", encoding="utf-8")


def main(*workdirs: str) -> None:
  """Prints a line per run."""
  print(f"{'run':36}{'rollouts':>10}{'mixed':>10}{'by position':>16}")
  for workdir in map(pathlib.Path, workdirs):
    kept, mixed, predicted = of_run(workdir)
    name = f"{workdir.parent.name}/{workdir.name}"
    print(f"{name:36}{kept:>10,}{100 * mixed:>8.1f} %{100 * predicted:>14.1f} %")


if __name__ == "__main__":
  main(*sys.argv[1:])
