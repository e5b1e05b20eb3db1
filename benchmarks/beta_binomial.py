"""Labels compared on the embedded corpus: hard, soft and beta, whose kappa is held against the truth.

  python -m benchmarks.beta_binomial FOLDER [--steps=945] [--seeds=0,1,2]

Trains `toy_bis10` with each kind of labels and each seed. Printed: macro-F1 (tuned on test), Brier
score and ECE of mu on the benchmark, whose labels are the truth of each step. For "beta" also, over
the steps of held-out rollouts, Spearman's correlation of kappa with minus the error of mu: the
distance from the rate of success of the same step in the same corpus drawn with 512 continuations.
Results: benchmarks/RESULTS.md.
"""

import itertools
import json
import pathlib

import numpy as np
from absl import app, flags
from scipy.stats import spearmanr

from bis_jax.console import start_logging
from bis_jax.corpus.corpus import Corpus
from bis_jax.run import stages
from bis_jax.run.held_out import HeldOut, draw
from bis_jax.scoring import step_scorer
from bis_jax.selection.manifest import Manifest
from bis_jax.settings.locations import locate
from bis_jax.toy import drawing
from configs import toy_bis10

_STEPS = flags.DEFINE_integer("steps", 945, "of training")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "of order and initialization")
_KINDS = flags.DEFINE_list("kinds", ["hard", "soft", "beta"], "of labels")
_SMALL = flags.DEFINE_bool("small", False, "a tiny model on 1,500 rollouts: does the script run?")
_CONTINUATIONS = 512


def rates(folder: pathlib.Path, config) -> dict[tuple[str, int], list[float]]:
  """Returns, by (source, line), the rate of success of every step with many continuations."""
  knobs = config.corpus.toy.to_dict() | {"n_mc": _CONTINUATIONS}
  drawn = drawing.draw(folder / "many", **knobs)
  return {
    (path.stem, at): [step["score"] for step in json.loads(line)["steps_with_score"]]
    for path in (drawn / "annotations").iterdir()
    for at, line in enumerate(path.open())
  }


def main(argv: list[str]) -> None:
  folder = pathlib.Path(argv[1])
  start_logging()
  truth, table = {}, {}
  for kind, seed in itertools.product(_KINDS.value, map(int, _SEEDS.value)):
    config = toy_bis10.get_config()
    config.corpus.cache = str(folder / "cache")
    config.seed, config.labels.kind, config.train.steps = seed, kind, _STEPS.value
    config.evaluation.every, config.evaluation.blank_images = 0, False
    if _SMALL.value:
      config.corpus.toy.rollouts, config.corpus.toy.images = 1500, 500
      config.corpus.toy.benchmark_items, config.evaluation.dev_rollouts = 60, 40
      config.model.size, config.pretrain.steps = "tiny", 2
    workdir = folder / f"{kind}-{seed}"
    block = stages.run(config, str(workdir))["thresholds"]
    measured = json.loads((workdir / "evaluation.json").read_text())
    row = [block["tuned_on_test"]["macro_f1_pooled"], measured["brier"], measured["ece"]]
    if kind == "beta":
      truth = truth or rates(folder, config)
      corpus = Corpus.open(locate(config).prepared)
      kept = Manifest.load(workdir / "manifest.json").rollout_indices(corpus)
      chosen = draw(corpus, kept, config.evaluation.dev_rollouts, config.seed)
      held_out = HeldOut(corpus, chosen, config)
      scorer = step_scorer.load(str(workdir))
      means = scorer.score(held_out.examples)
      kappas = scorer.of_concentrations().score(held_out.examples)
      rollouts = corpus.rollouts(chosen.tolist())
      true = [truth[rollout.source, rollout.line] for rollout in rollouts]
      error = np.abs(np.concatenate(means) - np.concatenate(true))
      row += [spearmanr(np.concatenate(kappas), -error)[0], np.median(np.concatenate(kappas))]
    table[kind, seed] = row
    print(kind, seed, " ".join(f"{value:.4f}" for value in row), flush=True)
  for kind in _KINDS.value:
    rows = np.array([row for (of, _), row in table.items() if of == kind])
    mean, spread = rows.mean(0), rows.std(0, ddof=1) if len(rows) > 1 else rows.std(0)
    shown = "  ".join(f"{m:.4f} +- {s:.4f}" for m, s in zip(mean, spread, strict=True))
    print(f"{kind:5} macro-F1, Brier, ECE{', kappa, median kappa' * (kind == 'beta')}: {shown}")


if __name__ == "__main__":
  app.run(main)
