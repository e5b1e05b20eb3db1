"""A run with labels of kind "beta", and the concentrations of its model."""

import json

import numpy as np

from bis_jax.corpus.corpus import Corpus
from bis_jax.run import stages
from bis_jax.scoring import step_scorer
from bis_jax.settings.locations import locate
from bis_jax.training.examples import RolloutExamples


def test_a_run_trains_beliefs_and_its_model_gives_concentrations(small_config, tmp_path):
  c = small_config.copy_and_resolve_references()
  with c.unlocked():
    c.labels.kind, c.evaluation.benchmark, c.pretrain.steps, c.train.steps = "beta", "", 0, 2
  stages.run(c, str(tmp_path / "run"))
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert np.isfinite([line["loss"] for line in lines]).all()
  corpus = Corpus.open(locate(c).prepared)
  examples = RolloutExamples(corpus, np.arange(12), c)
  counts = np.concatenate([example.weights for example in examples])
  assert (counts == c.corpus.toy.n_mc).all()  # weights are numbers of continuations
  scorer = step_scorer.load(str(tmp_path / "run"))
  assert scorer.believes
  means, concentrations = scorer.score(examples), scorer.of_concentrations().score(examples)
  assert [len(several) for several in means] == [len(several) for several in concentrations]
  assert (np.concatenate(means) <= 1).all() and (np.concatenate(concentrations) > 0).all()
