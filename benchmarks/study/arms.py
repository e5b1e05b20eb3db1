"""The arms of the study: parts, each a sweep over strategies, fractions and seeds.

`reliability_only` ranks as `reliable` does, so only the latter is an arm.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

_OTHERS = ("mixed", "reliable", "low_mc", "average_stepwise", "mixture_only")
_TWO = ("random", "bis")
_FEW = 3  # seeds where five would take too long
# Strategies that are newer than the paper's; docs/study.md has the reason for each.
NEWER = (
  "bis_grouped",
  "bis_by_position",
  "bis_posterior",
  "benchmarks.study.strategies:drop",
  "benchmarks.study.strategies:surprise",
)


@dataclasses.dataclass(frozen=True)
class Part:
  """Arms that share their settings.

  Attributes:
    name: its folder; several parts may share one.
    strategies, fractions: every pair of them is an arm.
    settings: config keys that differ from the recipe.
    words: the difference, for tables.
    like: of an ablation, the part from which it differs in one setting; otherwise "".
    first_seed, seeds: the first of its seeds and how many.
  """

  name: str
  strategies: tuple[str, ...]
  fractions: tuple[float, ...]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  words: str = ""
  like: str = ""
  first_seed: int = 0
  seeds: int = 5


def _ablation(name: str, words: str, settings: dict[str, Any], *strategies: str) -> Part:
  return Part(name, strategies, (0.1,), settings, words, like="grid", seeds=_FEW)


# The paper's alpha: 0.2 for a tenth and less, 0.05 for a quarter and more.
_SMALL, _LARGE = {"selection.alpha": 0.2}, {"selection.alpha": 0.05}
_LONG = {"evaluation.every": 800}  # fewer points of the curve of a long run
POWER = (
  Part("grid", ("random",), (0.1,), _SMALL),
  Part("grid", ("random",), (0.25,), _LARGE),
  Part("full", ("full",), (1.0,), _LONG, seeds=_FEW),
  Part("grid", ("random",), (0.05,), _SMALL),
  Part("grid", ("random",), (0.5,), _LARGE | _LONG, seeds=1),
)
MAIN = (
  *POWER[:3],
  Part("grid", ("bis",), (0.1,), _SMALL),
  Part("grid", NEWER[:3], (0.1,), _SMALL),
  Part("grid", (*NEWER[3:], *_OTHERS), (0.1,), _SMALL, seeds=_FEW),
  *POWER[3:],
  Part("grid", ("bis",), (0.05,), _SMALL),
  Part("grid", ("bis",), (0.25,), _LARGE, seeds=_FEW),
)
# Another corpus, on which nothing was set: other pictures and solutions, another power law, less
# reliable continuations.
SECOND, FRESH = "second", "fresh"
_SECOND = {
  "corpus.toy.seed": 2,
  "corpus.toy.kind_exponent": 1.0,
  "corpus.toy.slip": 1.0,
  "corpus.toy.recovery": 15.0,
  "corpus.toy.lapse": 2.0,
  "corpus.toy.n_mc": 8,
}
_ONE = {"selection.alpha": 1.0}
CONFIRM = (
  Part(SECOND, ("full",), (1.0,), _SECOND | _LONG, "second corpus", seeds=1),
  Part(SECOND, (*_TWO, *NEWER[:3]), (0.1,), _SECOND | _SMALL, "second corpus"),
  Part(FRESH, (*_TWO, "bis_by_position"), (0.1,), _SMALL, "fresh seeds", first_seed=100),
  # Was ahead as an ablation of the first corpus, so it has to show on others.
  Part("alpha_1_fresh", ("bis",), (0.1,), _ONE, "alpha 1, fresh seeds", FRESH, first_seed=100),
  Part("alpha_1_second", ("bis",), (0.1,), _SECOND | _ONE, "alpha 1, second corpus", SECOND),
)
# From a backbone whose first run is shorter, in a folder of its own.
WEAK_BACKBONE, WEAK_LEARN = "backbone_weak", {"train.steps": 500}
WEAK = (
  Part("weak", ("full",), (1.0,), _LONG, "weak backbone", seeds=1),
  Part("weak", (*_TWO, "bis_by_position"), (0.1,), _SMALL, "weak backbone"),
  Part("alpha_1_weak", ("bis",), (0.1,), _ONE, "alpha 1, weak backbone", like="weak"),
)
# Arms that differ in one setting.
ABLATIONS = (
  _ablation("alpha_0", "alpha 0", {"selection.alpha": 0.0}, "bis"),
  Part("alpha_1", ("bis",), (0.1,), _ONE, "alpha 1", like="grid"),
  _ablation("global", "one ranking over all sources", {"selection.per_source": False}, "bis"),
  _ablation(
    "plain_r", "R = 0 without positives", {"selection.reliability_if_no_positive": 0.0}, "bis"
  ),
  Part(
    *("truth", ("full",), (1.0,), _LONG | {"labels.kind": "truth"}, "true labels"),
    like="full",
    seeds=2,
  ),
  _ablation("truth", "true labels", {"labels.kind": "truth"}, *_TWO),
  *(_ablation(kind, f"{kind} labels", {"labels.kind": kind}, *_TWO) for kind in ("soft", "beta")),
  # Fewer mixed rollouts than a tenth holds. BIS is expected ahead: it takes all of them, and
  # `bis_by_position` a tenth.
  _ablation("rare", "mixed rollouts rare", {"corpus.toy.slip": 0.5}, *_TWO, "bis_by_position"),
  _ablation("tau_0.5", "tau 0.5", {"corpus.tau": 0.5}, *_TWO),
  _ablation("n_mc_4", "N = 4", {"corpus.toy.n_mc": 4}, *_TWO),
  *(
    _ablation(
      f"stopped_{policy}",
      f"annotation stops at a zero, steps after it {word}",
      {"corpus.toy.stop_at_zero": True, "corpus.unmeasured": policy},
      *_TWO,
    )
    for policy, word in (("negative", "negative"), ("ignore", "left out"))
  ),
)
# Parts of the first corpus, backbone and labels: their arms differ in the selection alone.
SELECTIONS = ("grid", "alpha_0", "alpha_1", "global", "plain_r")
# A checkpoint of the initial student, for the theory's measurement.
START = Part("start", ("random",), (0.1,), {"train.steps": 1, "optim.learning_rate": 1e-9})
QUICK = (
  Part("full", ("full",), (1.0,), _LONG, seeds=1),
  Part("grid", (*_TWO, "bis_by_position"), (0.1,), _SMALL, seeds=_FEW),
  Part("grid", ("random",), (0.25,), _LARGE, seeds=_FEW),
)
# Settings of --quick: a smaller corpus.
QUICK_SETTINGS = {"corpus.toy.rollouts": 12_000, "corpus.toy.images": 4_000}


def seeds_of(parts: Sequence[Part], most: int) -> list[tuple[Part, range]]:
  """Returns the parts with their seeds, of each at most `most`."""
  return [(part, range(part.first_seed, part.first_seed + min(most, part.seeds))) for part in parts]
