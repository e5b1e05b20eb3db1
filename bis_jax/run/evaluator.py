"""What a run is judged by, as it trains and at its end: its benchmark, and held-out rollouts."""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from bis_jax.console import log
from bis_jax.evaluation import step_evaluation
from bis_jax.evaluation.visual_process_bench import BenchmarkItem
from bis_jax.models.param_tree import Params
from bis_jax.run.held_out import HeldOut
from bis_jax.scoring.benchmark_examples import benchmark_examples
from bis_jax.scoring.step_scorer import Scorer


class Evaluator:
  """Scores with whatever parameters it is given; compiles once."""

  def __init__(
    self,
    config: ConfigDict,
    items: list[BenchmarkItem],
    held_out: HeldOut | None,
    scorer_of: Callable[[Params], Scorer],
  ):
    """Holds what is scored.

    Args:
      config: `config.evaluation`.
      items: the benchmark.
      held_out: training rollouts to tune a threshold on; None: none.
      scorer_of: makes a scorer of the run's model; called once.
    """
    self.items, self.held_out = items, held_out
    self._config, self._scorer_of = config, scorer_of
    self._scorer: Scorer | None = None
    count = min(config.every_items or len(items), len(items))
    self._some = [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]

  def while_training(self, step: int, params: Params) -> dict[str, float]:
    """Returns the benchmark's measures after a step, such as "tuned_on_test/accuracy".

    They are of `every_items` items, evenly spaced over the benchmark. Those that do not exist for
    the data are left out.
    """
    scores = self._score(params, self._some, blank=False)
    thresholds = step_evaluation.evaluate(self._some, scores, bootstrap_draws=0)["thresholds"]
    overall = thresholds["tuned_on_test"]["overall_source_weighted"]
    log.info("step %d: overall_source_weighted %.4f, tuned on test", step, overall)
    return {
      f"{name}/{measure}": value
      for name, block in thresholds.items()
      for measure, value in block.items()
      if isinstance(value, float)
    }

  def score(self, params: Params, *, blank: bool = False) -> list[np.ndarray]:
    """Returns every benchmark item's step scores; `blank` greys its images out.

    Raises:
      UnscoredStepError: an item is too long.
    """
    return self._score(params, self.items, blank=blank)

  def score_held_out(self, params: Params) -> tuple[list[np.ndarray], list[int]]:
    """Returns (scores of the held-out rollouts, which of them were short enough to have any)."""
    scores, refused = self._scorer_with(params).score_each(self.held_out.examples)
    if refused:
      log.info("%d of %d held-out rollouts are too long", len(refused), len(scores))
    return scores, [i for i in range(len(scores)) if i not in refused]

  def _score(self, params: Params, items: list[BenchmarkItem], *, blank: bool) -> list[np.ndarray]:
    examples = benchmark_examples(items, self._config.images, blank=blank)
    return self._scorer_with(params).score(examples)

  def _scorer_with(self, params: Params) -> Scorer:
    if self._scorer is None:
      self._scorer = self._scorer_of(params)
    return self._scorer.with_params(params)
