"""Periodic and final evaluation on the benchmark and on held-out rollouts."""

import numpy as np
from ml_collections import ConfigDict

from bis_jax.console import log
from bis_jax.evaluation import step_evaluation
from bis_jax.evaluation.benchmarks import Benchmark
from bis_jax.evaluation.visual_process_bench import BenchmarkItem
from bis_jax.models.param_tree import Params
from bis_jax.run.held_out import HeldOut
from bis_jax.scoring.benchmark_examples import benchmark_examples
from bis_jax.scoring.step_scorer import Scorer


class Evaluator:
  """Scores with the parameters that it is given; compiles once."""

  def __init__(
    self,
    config: ConfigDict,
    benchmark: Benchmark,
    held_out: HeldOut | None,
    scorer: Scorer,
  ):
    """`config` is `config.evaluation`; the parameters of `scorer` are not used."""
    items = benchmark.items
    self.kind, self.items, self.held_out = benchmark.kind, items, held_out
    self._config, self._scorer = config, scorer
    count = min(config.every_items or len(items), len(items))
    self._subset = [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]

  def while_training(self, step: int, params: Params) -> dict[str, float]:
    """Returns the benchmark's metrics after a step, such as "tuned_on_test/accuracy".

    Computed on `every_items` items, evenly spaced over the benchmark; undefined ones are left out.
    """
    scores = self._score(params, self._subset)
    thresholds = step_evaluation.evaluate(self._subset, scores, bootstrap_draws=0)["thresholds"]
    overall = thresholds["tuned_on_test"]["overall_source_weighted"]
    log.info("step %d: overall_source_weighted %.4f, tuned on test", step, overall)
    return {
      f"{name}/{metric}": value
      for name, block in thresholds.items()
      for metric, value in block.items()
      if isinstance(value, float)
    }

  def score(self, params: Params, *, blank: bool = False) -> list[np.ndarray]:
    """Returns the step scores of every benchmark item; `blank` replaces its images by grey ones.

    Raises UnscoredStepError if an item is too long.
    """
    return self._score(params, self.items, blank=blank)

  def score_held_out(self, params: Params) -> dict[int, np.ndarray]:
    """Returns the step scores of every held-out rollout that is not too long, by its index."""
    if self.held_out is None:
      return {}
    scores, rejected = self._scorer.with_params(params).score_each(self.held_out.examples)
    if rejected:
      log.info("%d of %d held-out rollouts are too long", len(rejected), len(scores))
    return {i: score for i, score in enumerate(scores) if i not in rejected}

  def _score(
    self, params: Params, items: list[BenchmarkItem], *, blank: bool = False
  ) -> list[np.ndarray]:
    examples = benchmark_examples(items, self._config.images, blank=blank)
    return self._scorer.with_params(params).score(examples)
