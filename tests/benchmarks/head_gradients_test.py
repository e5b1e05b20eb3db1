"""The measured gradients are those of training's own loss; the study's command measures them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from benchmarks.study import head_gradients, theory_curves, theory_on_model, theory_page
from benchmarks.study.head_gradients import Steps
from bis_jax.corpus.corpus import Corpus
from bis_jax.inputs import pipeline
from bis_jax.inputs.rows import device_arrays
from bis_jax.models import backbones
from bis_jax.models.chip_settings import run_mesh
from bis_jax.models.processor import make_processor
from bis_jax.run import stages
from bis_jax.scoring import restore
from bis_jax.settings import locations, workdir
from bis_jax.training import checkpoint, train_state
from bis_jax.training.examples import RolloutExamples
from bis_jax.training.train_state import TrainState
from bis_jax.training.train_step import loss_and_grads

CHOSEN = np.array([3, 100, 101, 402, 777])


@pytest.fixture(scope="module")
def place(small_config, tmp_path_factory):
  """The workdir of an untrained tiny model with a random head, on a thousand rollouts."""
  config = small_config
  where = locations.locate(config)
  corpus = stages.prepare_corpus(config, where)
  folder = epath.Path(tmp_path_factory.mktemp("theory") / "run")
  workdir.claim(folder, config)
  stages.select_rollouts(config, corpus, folder / "manifest.json")
  mesh = run_mesh(config)
  processor = make_processor(config, where.tokenizer)
  model = backbones.model_config(config, len(processor.tokenizer))
  _, shapes = backbones.structure(model, mesh)
  params = train_state.first_params(model, shapes, None, processor.prompt.special, config.seed)
  head = params[head_gradients.HEAD]
  drawn = np.random.default_rng(0).normal(size=head.shape) / np.sqrt(head.shape[0])
  params[head_gradients.HEAD] = jax.device_put(drawn.astype(head.dtype), head.sharding)
  with checkpoint.Checkpoints(folder, every=1, keep=1) as checkpoints:
    checkpoints.save(3, TrainState(jnp.int32(3), params, {"m": jnp.zeros(2)}), {})
  return folder


def _of_training(model, examples, i):
  """Returns the head's gradient of the loss of a batch that holds example i alone, [D, 2]."""
  inputs, processor = model.config.inputs, model.processor
  measured = pipeline.measure(
    examples, processor.prompt, processor.images, max_length=inputs.max_length
  )
  plan = measured.plan_rows(inputs, only=np.array([i]), shuffle=False)
  (batch,) = pipeline.BatchIterator(measured, plan, rows_per_batch=1)
  batch = {key: value[None] for key, value in device_arrays(batch).items()}
  head = {head_gradients.HEAD: model.params[head_gradients.HEAD]}
  others = {path: array for path, array in model.params.items() if path not in head}
  step = jax.jit(lambda rows: loss_and_grads(model.graph, head, others, rows, "global")[1])
  with jax.set_mesh(model.mesh):
    return np.asarray(step(batch)[head_gradients.HEAD])


def test_gradients_are_those_of_trainings_loss(place):
  model = restore.load_run(str(place))
  corpus = Corpus.open(locations.locate(model.config).prepared)
  examples = RolloutExamples(corpus, CHOSEN, model.config)
  state_SD = head_gradients.marker_states(model, examples)
  counts = [len(examples[i].steps) for i in range(len(CHOSEN))]
  label_S = np.concatenate([examples[i].targets for i in range(len(CHOSEN))])
  steps = Steps(np.repeat(np.arange(len(CHOSEN)), counts), label_S, label_S, label_S)
  probability_S = head_gradients.probabilities(model.params, state_SD)
  width = state_SD.shape[1]
  for i in (0, 3):
    ours_D2 = _of_training(model, examples, i)
    np.testing.assert_allclose(ours_D2[:, 0], -ours_D2[:, 1], atol=1e-6)
    found = head_gradients.rollout_gradients(steps, probability_S, state_SD, np.eye(width)[2])
    assert found.square[i] == pytest.approx((ours_D2[:, 0] ** 2).sum(), rel=1e-4)
    assert found.aligned[i] == pytest.approx(-ours_D2[2, 0], rel=1e-4, abs=1e-6)


@pytest.fixture
def drawn():
  """Three rollouts of 4, 1 and 2 steps with random states and probabilities."""
  rng = np.random.default_rng(1)
  rollout_S = np.repeat([0, 1, 2], [4, 1, 2])
  label_S, truth_S = (rng.integers(0, 2, 7).astype(float) for _ in range(2))
  steps = Steps(rollout_S, label_S, truth_S, label_S)
  return steps, rng.uniform(size=7), rng.normal(size=(7, 5))


def test_the_parts_of_a_gradient(drawn):
  steps, probability_S, state_SD = drawn
  direction = head_gradients.true_direction(steps, probability_S, state_SD)
  assert np.linalg.norm(direction) == pytest.approx(1)
  found = head_gradients.rollout_gradients(steps, probability_S, state_SD, direction)
  for i, here in enumerate((slice(0, 4), slice(4, 5), slice(5, 7))):
    residual, states = (probability_S - steps.label_S)[here], state_SD[here]
    contrast = (residual - residual.mean()) @ (states - states.mean(axis=0)) / len(residual)
    assert found.square[i] == pytest.approx(((residual @ states / len(residual)) ** 2).sum())
    assert found.contrast_square[i] == pytest.approx((contrast**2).sum(), abs=1e-12)
    assert found.contrast[i] == pytest.approx(-contrast @ direction, abs=1e-12)
  # Along the direction the true loss of all steps falls at the full rate.
  steps_of = np.bincount(steps.rollout_S)
  rate = np.linalg.norm((probability_S - steps.truth_S) @ state_SD)
  assert (steps_of * found.true_aligned).sum() == pytest.approx(rate)


def test_the_prior_is_taken_out_of_a_direction(drawn):
  _, _, state_SD = drawn
  direction = np.ones(5) / np.sqrt(5)
  left = head_gradients.without_prior(direction, state_SD)
  mean = state_SD.mean(axis=0)
  assert np.linalg.norm(left) == pytest.approx(1) and left @ mean == pytest.approx(0, abs=1e-12)
  assert np.linalg.matrix_rank(np.stack([left, direction, mean])) == 2


def test_the_fitted_direction_is_the_teachers():
  rng = np.random.default_rng(0)
  truth_S = rng.integers(0, 2, 4000).astype(float)
  teacher = np.array([3.0, -4.0, 0.0]) / 5
  state_SD = rng.normal(size=(4000, 3)) + 2 * truth_S[:, None] * teacher + np.array([[5, 0, 1]])
  steps = Steps(np.arange(4000), truth_S, truth_S, truth_S)
  assert head_gradients.fitted_direction(steps, state_SD) @ teacher > 0.99
  prior = np.full(4000, truth_S.mean())  # then the loss's own direction is the same
  assert head_gradients.true_direction(steps, prior, state_SD) @ teacher > 0.99


def test_the_study_measures_a_run(place, tmp_path):
  measured = theory_on_model.measure([str(place)], rollouts=240, draws=20)
  assert measured["rollouts"] == 240 and measured["rollouts_for_direction"] == 120
  own, prior_alone = measured["students"]
  assert own["name"] == "run, step 3" and prior_alone["name"].startswith("prior alone")
  assert sum(block["rollouts"] for block in own["by_tenth"]["BIS"]) == 240
  # With one answer for all steps a pure rollout has no contrast.
  pure = prior_alone["by_mixture"][0]
  assert pure["mixture"] == 0 and pure["contrast_square"] == pytest.approx(0, abs=1e-12)
  assert prior_alone["by_mixture"][-1]["contrast_square"] > 1e-6
  assert 0 <= own["roc_auc"] <= 1 and prior_alone["roc_auc"] == 0.5
  rates = [rate for rate in measured["flips"]["rate"] if rate is not None]
  assert all(0 <= rate <= 1 for rate in rates) and measured["flips"]["rate"][16] < 0.1
  words = theory_page.measured_words(measured)
  assert f"{100 * own['contrast_share_of_square']:.2f}" in words and "at 2 students" in words
  assert sum(measured["kinds"].values()) == pytest.approx(1)
  assert measured["kinds"]["mixed"] == pytest.approx(measured["mixed"])
  top = measured["highest_tenth"]["p(1-p)"]["mixed"]
  assert top == pytest.approx(min(1, 10 * measured["mixed"]))  # they are the highest by p(1-p)
  assert sum(block["rollouts"] for block in own["by_kind"].values()) == 240
  results = {
    "simulation": theory_curves.compare(3),
    "curves": theory_curves.curves(),
    "measured": measured,
  }
  theory_page.write(tmp_path, json.loads(json.dumps(results)))
  page = (tmp_path / "index.html").read_text()
  assert page.count("data:image/png") == len(list((tmp_path / "plots").iterdir())) == 8
  assert "http" not in page.replace("http-equiv", "")


def test_samples_share_no_picture_and_hold_nothing_that_was_trained_on(place):
  model = restore.load_run(str(place))
  corpus = Corpus.open(locations.locate(model.config).prepared)
  kept = np.arange(0, 1000, 7)
  (first, second), group = theory_on_model._draw(corpus, kept, (200, 100))
  assert len(first) == 200 and len(second) == 100
  assert not np.isin(np.concatenate([first, second]), kept).any()
  pictures = [{corpus.image_ids(int(i))[0] for i in part} for part in (first, second)]
  assert not pictures[0] & pictures[1]
  assert np.unique(group).size == len(pictures[0])
