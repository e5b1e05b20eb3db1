"""Runs of a few steps under the settings that ablations vary, and the labels that training sees."""

import json
import math

import pytest

from bis_jax.corpus.corpus import Corpus
from bis_jax.run import stages
from bis_jax.selection.manifest import Manifest
from bis_jax.settings import locations
from bis_jax.toy import drawing
from bis_jax.training.examples import RolloutExamples

# Of each run what differs from the small recipe, and the label (None: no label) of a step with MC
# score s, measured by n continuations, and of truth t.
RUNS = [
  (
    {
      "corpus.tau": 0.5,
      "corpus.unmeasured": "ignore",
      "corpus.toy.n_mc": 4,
      "corpus.toy.stop_at_zero": True,
    },
    lambda s, n, t: s > 0.5 if n else None,
  ),
  (
    {"labels.kind": "soft", "corpus.toy.n_mc": 8, "selection.per_source": False},
    lambda s, n, t: s,
  ),
  (
    {"labels.kind": "banded", "corpus.toy.n_mc": 64, "selection.reliability_if_no_positive": 0.0},
    lambda s, n, t: None if 0 < s <= 0.5 else s > 0.5,
  ),
  ({"corpus.toy.stop_at_zero": True, "labels.kind": "truth"}, lambda s, n, t: t),
]


@pytest.mark.parametrize("changes, label", RUNS, ids=[", ".join(changes) for changes, _ in RUNS])
def test_a_run_trains_on_the_labels_asked_for(small_config, tmp_path, changes, label):
  config = small_config.copy_and_resolve_references()
  with config.unlocked():
    config.corpus.toy.slip, config.corpus.toy.recovery, config.corpus.toy.lapse = 3.0, 5.0, 3.0
    config.corpus.workers = 1
    config.pretrain.steps, config.train.steps, config.train.checkpoint_every = 0, 2, 2
    config.evaluation.benchmark = ""
    config.update_from_flattened_dict(changes)
  stages.run(config, str(tmp_path / "run"))
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(line)["loss"] for line in lines]
  assert len(losses) == 2 and all(0 < loss < math.inf for loss in losses)

  where = locations.locate(config)
  corpus, truth = Corpus.open(where.prepared), drawing.read_truth(where.toy)
  manifest = Manifest.load(tmp_path / "run" / "manifest.json")
  assert manifest.tau == config.corpus.tau and manifest.unmeasured == config.corpus.unmeasured
  assert manifest.reliability_if_no_positive == config.selection.reliability_if_no_positive
  shares = {source.lines.size / source.scorable for source in manifest.sources}
  assert (max(shares) < 0.11) == config.selection.per_source
  indices = manifest.rollout_indices(corpus)
  examples, unlike = RolloutExamples(corpus, indices, config), 0
  for i, index in enumerate(indices):
    rollout = corpus.rollout(int(index))
    path = where.annotations / f"{rollout.source}.jsonl"
    steps = json.loads(path.read_text().splitlines()[rollout.line])["steps_with_score"]
    right = truth[rollout.source, rollout.line]
    for step, t, target, weight in zip(
      steps, right, examples[i].targets, examples[i].weights, strict=True
    ):
      asked = label(step["score"], step["num_mc_total"], t)
      assert (None if weight == 0 else target) == asked
      assert step["num_mc_total"] in (0, config.corpus.toy.n_mc)
      unlike += asked != (step["score"] > 0)
  assert unlike > 3, "the plain labels would do as well"
