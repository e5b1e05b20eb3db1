"""What the study compares: parts, each a sweep of strategies, fractions and seeds.

`reliability_only` ranks as `reliable` does, so one arm stands for both.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

GRID = ("random", "mixed", "reliable", "low_mc", "average_stepwise", "mixture_only", "bis")
# Of arms on a corpus of their own, whose backbone must be trained too: one for all seeds.
_ONE_BACKBONE = {"pretrain.seed": 0}
RATES = (3e-4, 1e-3, 3e-3)  # peak learning rates to choose from


@dataclasses.dataclass(frozen=True)
class Part:
  """Arms that share their settings.

  Attributes:
    name: its folder; several parts may share one.
    strategies, fractions: every pair of them is an arm.
    settings: config keys that differ from the recipe.
    words: what is different, for tables.
  """

  name: str
  strategies: tuple[str, ...]
  fractions: tuple[float, ...]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  words: str = ""

  @property
  def draws(self) -> bool:
    """Whether it may be the first on its corpus, which is then drawn before arms run abreast."""
    return any(key.startswith("corpus.") for key in self.settings)


def _ablation(name: str, words: str, settings: dict[str, Any], *strategies: str) -> Part:
  return Part(name, strategies, (0.1,), settings, words)


# The paper's alpha: 0.2 for a tenth and less, 0.05 for a quarter and more.
MAIN = (
  Part("full", ("full",), (1.0,)),
  Part("grid", GRID, (0.1, 0.05), {"selection.alpha": 0.2}),
  Part("grid", GRID, (0.25, 0.5), {"selection.alpha": 0.05}),
)
ABLATIONS = (
  *(
    _ablation(f"alpha_{alpha:g}", f"alpha {alpha:g}", {"selection.alpha": alpha}, "bis")
    for alpha in (0.0, 0.05, 1.0)
  ),
  _ablation("plain_r", "R = 0 without positives", {"selection.none_positive": 0.0}, "bis"),
  _ablation("global", "one ranking over all sources", {"selection.per_source": False}, "bis"),
  _ablation("passes_5", "five passes", {"train.epochs": 5}, "random", "bis"),
  _ablation("truth", "true labels", {"labels.kind": "truth"}, "random", "bis"),
  Part("truth", ("full",), (1.0,), {"labels.kind": "truth"}, "true labels"),
  *(
    _ablation(kind, f"{kind} labels", {"labels.kind": kind}, "random", "bis")
    for kind in ("soft", "banded")
  ),
  *(
    _ablation(f"tau_{tau:g}", f"tau {tau:g}", {"corpus.tau": tau}, "random", "bis")
    for tau in (0.125, 0.25, 0.5)
  ),
  *(
    _ablation(
      f"stopped_{policy}",
      f"annotation stops at a zero, steps after it {word}",
      {"corpus.toy.stop_at_zero": True, "corpus.unmeasured": policy} | _ONE_BACKBONE,
      "random",
      "bis",
    )
    for policy, word in (("negative", "negative"), ("ignore", "left out"))
  ),
  *(
    _ablation(f"n_mc_{n}", f"N = {n}", {"corpus.toy.n_mc": n} | _ONE_BACKBONE, "random", "bis")
    for n in (4, 8, 64)
  ),
  *(
    _ablation(
      f"{key}_{factor:g}", words, {f"corpus.toy.{key}": factor} | _ONE_BACKBONE, "random", "bis"
    )
    for key, factor, words in (
      ("slip", 0.67, "half the wrong notes"),
      ("slip", 4.0, "three times the wrong notes"),
      ("recovery", 30.0, "unreliable positives: wrong states recover 30 times as often"),
    )
  ),
)
QUICK = (
  Part("full", ("full",), (1.0,)),
  Part("grid", ("random", "mixed", "bis"), (0.1,), {"selection.alpha": 0.2}),
  Part("grid", ("random", "bis"), (0.25,), {"selection.alpha": 0.05}),
  _ablation("alpha_0", "alpha 0", {"selection.alpha": 0.0}, "bis"),
)
# A student that is saved but has not moved: what a selection meets, for the theory's measurement.
START = Part("start", ("random",), (0.1,), {"train.steps": 1, "optim.learning_rate": 1e-9})
# A smaller corpus, and one backbone for all seeds: 20 minutes.
QUICK_SETTINGS = {
  "corpus.toy.rollouts": 24_000,
  "corpus.toy.images": 8_000,
  "pretrain.seed": 0,
  "evaluation.dev_rollouts": 200,
}


def rate_part(rate: float) -> tuple[Part, ...]:
  """Returns the arms that one learning rate is judged by."""
  settings = {"optim.learning_rate": rate}
  return (
    Part(f"rates/{rate:g}", ("full",), (1.0,), settings),
    Part(f"rates/{rate:g}", ("random",), (0.1,), settings),
  )
