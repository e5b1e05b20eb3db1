"""What a step's place alone tells of its label, among the rollouts that runs were trained on.

  python -m benchmarks.study.positions RUN [RUN ...]

A solution that goes wrong mostly stays wrong. So in a rollout of five steps with p near 1/2 the first
two are right and the last two wrong, whatever is in the picture, and a model that was trained on
such rollouts alone can fit their labels without a look. This prints, for each run, how many of the
kept rollouts are mixed, and the share of the entropy of its hard labels that source, number of steps
and place tell: 1 - H(label | place) / H(label).

Last result (runs of the study on tenths of 48,000 rollouts, seed 0):

  run                                   rollouts     mixed   told by place
  larger/random_0.1_seed0                  4,800     9.0 %           5.2 %
  larger/mixed_0.1_seed0                   4,800    82.1 %          39.7 %
  larger/reliable_0.1_seed0                4,800     3.9 %           6.5 %
  larger/mixture_only_0.1_seed0            4,800    82.1 %          44.2 %
  larger/bis_0.1_seed0                     4,800    74.1 %          34.4 %
  plain_r/bis_0.1_seed0                    4,800    74.7 %          39.5 %
  recovery_30/random_0.1_seed0             4,800    11.0 %          18.4 %
  recovery_30/bis_0.1_seed0                4,800    64.9 %          41.9 %
  slip_4/random_0.1_seed0                  4,800    25.0 %           7.8 %
  slip_4/bis_0.1_seed0                     4,800   100.0 %          71.6 %

With three times the wrong notes there are more mixed rollouts than a tenth holds, so BIS takes those
with p nearest 1/2 alone, whose labels their places all but tell; there it is worse than random.
"""

import json
import pathlib
import sys
from collections.abc import Iterable

import numpy as np
from ml_collections import ConfigDict
from scipy import special

from bis_jax.corpus.corpus import Corpus
from bis_jax.selection.manifest import Manifest
from bis_jax.settings import locations

_RUNS = "*_0.1_seed0/evaluation.json"


def share_told(place: np.ndarray, label: np.ndarray) -> float:
  """Returns 1 - H(label | place) / H(label), in [0, 1]; 0 where all labels are equal.

  Args:
    place: int[steps], what stands for all that is known of where a step is.
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
  """Returns of a run's kept rollouts their number, the share of mixed ones, and `share_told`."""
  config = ConfigDict(json.loads((workdir / "config.json").read_text()))
  corpus = Corpus.open(locations.locate(config).prepared)
  kept = Manifest.load(workdir / "manifest.json").rollout_indices(corpus)
  places, labels, mixed = [], [], 0
  sources: dict[str, int] = {}
  for index in kept:
    rollout = corpus.rollout(int(index))
    positive = np.asarray(rollout.scores) > config.corpus.tau
    source = sources.setdefault(rollout.source, len(sources))
    n = len(positive)
    places.append((source << 32) + (n << 16) + np.arange(n))
    labels.append(positive)
    mixed += 0 < positive.sum() < n
  return len(kept), mixed / len(kept), share_told(np.concatenate(places), np.concatenate(labels))


def write(folder: pathlib.Path, parts: Iterable[str]) -> None:
  """Writes folder/positions.json: {"part/run": `of_run`} of the tenths of some parts, of seed 0."""
  found = sorted(path.parent for part in parts for path in (folder / part).glob(_RUNS))
  told = {f"{workdir.parent.name}/{workdir.name}": of_run(workdir) for workdir in found}
  (folder / "positions.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def main(*workdirs: str) -> None:
  """Prints a line a run."""
  print(f"{'run':36}{'rollouts':>10}{'mixed':>10}{'told by place':>16}")
  for workdir in map(pathlib.Path, workdirs):
    kept, mixed, told = of_run(workdir)
    name = f"{workdir.parent.name}/{workdir.name}"
    print(f"{name:36}{kept:>10,}{100 * mixed:>8.1f} %{100 * told:>14.1f} %")


if __name__ == "__main__":
  main(*sys.argv[1:])
