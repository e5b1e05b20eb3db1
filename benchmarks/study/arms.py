"""The arms of the study: parts, each a sweep over strategies, fractions and seeds.

`reliability_only` ranks as `reliable` does, so only the latter is an arm.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

_OTHERS = ("mixed", "reliable", "low_mc", "average_stepwise", "mixture_only")
_TWO = ("random", "bis")
GRID = ("random", *_OTHERS, "bis")
# Peak learning rates and rollouts per step to choose from.
CANDIDATES: Mapping[str, Mapping[str, Any]] = {
  f"learning rate {rate:g}, {batch} rollouts per step": {
    "optim.learning_rate": rate,
    "train.global_batch": batch,
    "inputs.row_multiple": batch // 2,
  }
  for rate, batch in ((3e-4, 4), (1e-3, 4), (2e-3, 16))
}


@dataclasses.dataclass(frozen=True)
class Part:
  """Arms that share their settings.

  Attributes:
    name: its folder; several parts may share one.
    strategies, fractions: every pair of them is an arm.
    settings: config keys that differ from the recipe.
    words: the difference, for tables.
    like: of an ablation, the part from which it differs in one setting; otherwise "".
  """

  name: str
  strategies: tuple[str, ...]
  fractions: tuple[float, ...]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  words: str = ""
  like: str = ""


# A tenth in five passes has half the steps of `full`, in one a tenth of them.
PASSES = "passes_5"
_FIVE = {"train.epochs": 5}
# Rollouts, batch and rate of the toy recipes' main job, and one backbone for all seeds, as for a
# published model: seeds differ only in the order and the choice of rollouts.
LARGER, _OF_48 = "larger", "of 48,000"
_LARGER = {
  "corpus.toy.rollouts": 48_000,
  "corpus.toy.images": 16_000,
  "pretrain.seed": 0,
  "optim.learning_rate": 1e-3,
  "train.global_batch": 16,
  "inputs.row_multiple": 8,
}
_THREE = {"train.epochs": 3}


def _ablation(name: str, words: str, settings: dict[str, Any], *strategies: str) -> Part:
  """Returns an ablation in five passes: after one, the model only uses the text."""
  return Part(name, strategies, (0.1,), settings | _FIVE, words, like=PASSES)


# The paper's alpha: 0.2 for a tenth and less, 0.05 for a quarter and more.
MAIN = (
  Part("full", ("full",), (1.0,)),
  Part("grid", GRID, (0.1, 0.05), {"selection.alpha": 0.2}),
  Part("grid", GRID, (0.25,), {"selection.alpha": 0.05}),
  Part(PASSES, _TWO, (0.1,), _FIVE, "five passes"),
  Part(LARGER, ("full",), (1.0,), _LARGER, f"{_OF_48}, one pass"),
  Part(LARGER, _TWO, (0.1,), _LARGER | _THREE, f"{_OF_48}, three passes"),
  *(Part("grid", strategies, (0.5,), {"selection.alpha": 0.05}) for strategies in (_TWO, _OTHERS)),
)
# With three seeds: other solutions and the other strategies on the larger corpus; then the treatment
# of scores and labels.
ABLATIONS = (
  *(
    Part(name, strategies, (0.1,), _LARGER | _THREE | own, f"{_OF_48}, {words}", LARGER)
    for name, strategies, words, own in (
      ("slip_4", _TWO, "three times the wrong notes", {"corpus.toy.slip": 4.0}),
      (
        "recovery_30",
        _TWO,
        "unreliable positives, by recovery x 30",
        {"corpus.toy.recovery": 30.0},
      ),
      (
        "plain_r",
        ("bis",),
        "R = 0 without positives",
        {"selection.reliability_if_no_positive": 0.0},
      ),
    )
  ),
  Part(LARGER, _OTHERS, (0.1,), _LARGER | _THREE, f"{_OF_48}, three passes"),
  *(
    _ablation(f"alpha_{alpha:g}", f"alpha {alpha:g}", {"selection.alpha": alpha}, "bis")
    for alpha in (0.0, 0.05, 1.0)
  ),
  _ablation("global", "one ranking over all sources", {"selection.per_source": False}, "bis"),
  _ablation("truth", "true labels", {"labels.kind": "truth"}, "random", "bis"),
  Part("truth", ("full",), (1.0,), {"labels.kind": "truth"}, "true labels, one pass"),
  *(
    _ablation(f"n_mc_{n}", f"N = {n}", {"corpus.toy.n_mc": n}, "random", "bis") for n in (4, 8, 64)
  ),
  *(
    _ablation(kind, f"{kind} labels", {"labels.kind": kind}, "random", "bis")
    for kind in ("soft", "banded")
  ),
  _ablation("tau_0.5", "tau 0.5", {"corpus.tau": 0.5}, "random", "bis"),
  *(
    _ablation(
      f"stopped_{policy}",
      f"annotation stops at a zero, steps after it {word}",
      {"corpus.toy.stop_at_zero": True, "corpus.unmeasured": policy},
      "random",
      "bis",
    )
    for policy, word in (("negative", "negative"), ("ignore", "left out"))
  ),
)
QUICK = (
  Part("full", ("full",), (1.0,)),
  Part("grid", ("random", "mixed", "bis"), (0.1,), {"selection.alpha": 0.2}),
  Part("grid", ("random", "bis"), (0.25,), {"selection.alpha": 0.05}),
  Part(PASSES, ("random", "bis"), (0.1,), _FIVE, "five passes"),
)
# Run first, because the others need them: the corpus; then per seed the backbone and a checkpoint of
# the initial student, for the theory's measurement.
_UNMOVED = {"train.steps": 1, "optim.learning_rate": 1e-9}
DRAWN = Part("drawn", ("random",), (0.1,), _UNMOVED | {"pretrain.steps": 0})
START = Part("start", ("random",), (0.1,), _UNMOVED)
# A smaller corpus, and one backbone for all seeds.
QUICK_SETTINGS = {"corpus.toy.rollouts": 12_000, "corpus.toy.images": 4_000, "pretrain.seed": 0}


def seeds_of(parts: Sequence[Part], seeds: int) -> list[tuple[Part, range]]:
  """Returns the parts with their seeds in running order, the most expensive (half the corpus) last.

  `seeds` for the parts of `MAIN`; at most 3 for ablations and for all parts of `QUICK`.
  """
  many, few = range(seeds), range(min(seeds, 3))
  last = sorted(parts, key=lambda part: part.fractions == (0.5,))
  return [(part, many if part in MAIN and parts != QUICK else few) for part in last]


def candidate_parts(name: str) -> tuple[Part, ...]:
  """Returns the arms that evaluate one of `CANDIDATES`, on the backbone of seed 0."""
  place = "candidates/" + "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
  settings = dict(CANDIDATES[name]) | {"pretrain.seed": 0}
  return Part(place, ("full",), (1.0,), settings), Part(place, ("random",), (0.1,), settings)
