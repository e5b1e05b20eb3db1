"""What a server remembers changes no score: prefixes and steps are taken from the device's memory."""

import collections
import copy
import dataclasses
import functools
import importlib
import re

import jax
import numpy as np
import pytest

from bis_jax.errors import UserError
from bis_jax.evaluation import visual_process_bench
from bis_jax.inputs.prompt import Sample
from bis_jax.inputs.rows import NO_SLOT
from bis_jax.models import backbones
from bis_jax.models.processor import make_processor
from bis_jax.parallel import sharding
from bis_jax.scoring import prefix_cache, server, solutions
from bis_jax.scoring.prefix_tree import PrefixTree, chain_of
from bis_jax.scoring.solutions import Solution, SolutionError
from bis_jax.scoring.step_scorer import Scorer
from bis_jax.settings import locations
from bis_jax.toy import drawing
from bis_jax.training import train_state
from tests.served import Served


@pytest.fixture(scope="module", params=["qwen_bis10"])
def config(request, small_config):
  config = importlib.import_module(f"configs.{request.param}").get_config("toy")
  config.corpus = small_config.corpus
  config.model.size = "toy" if request.param == "internvl_bis10" else "tiny"
  config.inputs.row_patches *= 2
  return config.lock()


@pytest.fixture(scope="module")
def make(config):
  """make(slots, devices) -> a scorer of a random model that remembers nothing yet.

  All are the same model. There is one memory per number of devices, of which up to `slots` are used.
  """
  where = locations.locate(config)
  drawing.draw(where.toy, workers=1, **config.corpus.toy)
  processor = make_processor(config, where.tokenizer)
  model = backbones.model_config(config, len(processor.tokenizer))

  @functools.cache
  def scorer_of(devices):
    mesh = sharding.make_mesh(-1, 1, 2 if devices > 2 else 1, jax.devices()[:devices])
    graph, shapes = backbones.structure(model, mesh)
    special = processor.prompt.special
    params = train_state.first_params(model, shapes, None, special, config.seed)
    path, rng = "language_model.embed_tokens.embedding", np.random.default_rng(0)
    drawn = rng.normal(size=params[path].shape).astype(np.float32)
    params[path] = jax.device_put(drawn, params[path].sharding)
    return Scorer(processor, config.inputs, mesh, graph, params, batch_rows=devices)

  @functools.cache
  def remembering(devices):
    scorer = copy.copy(scorer_of(devices))
    scorer.warm_up(1 << 30)
    return scorer

  def of(slots=0, devices=1):
    if not slots:
      return scorer_of(devices)
    scorer = copy.copy(remembering(devices))
    scorer.cache = copy.copy(scorer.cache)
    scorer.cache.clear()
    scorer.cache.tree = PrefixTree(slots)
    return scorer

  return of


@pytest.fixture(scope="module")
def plain(make):
  return make()


@pytest.fixture(scope="module")
def items(config, make):
  found = visual_process_bench.load(locations.locate(config).benchmark)
  return [Solution.of(i.question, i.steps, visual_process_bench.encoded_images(i)) for i in found]


def requests_of(items, seed, rounds):
  """Random batches: new questions, the same again, steps more and fewer, other images, too long."""
  rng = np.random.default_rng(seed)
  steps = [step for one in items for step in one.steps]
  texts = [tuple(steps[k] for k in rng.integers(0, len(steps), 4)) for _ in range(12)]
  for _ in range(rounds):
    batch = []
    for _ in range(rng.integers(1, 9)):
      one = items[rng.integers(0, 5)]
      if rng.random() < 0.2:
        one = dataclasses.replace(one, question=items[1].question)
      own = texts[rng.integers(0, 12)][: rng.integers(1, 5)]
      batch.append(dataclasses.replace(one, steps=own))
    if rng.random() < 0.2:
      batch.append(dataclasses.replace(items[0], steps=("Add one to it. ",) * 99))
    yield batch


def assert_same(found, wanted):
  for a, b in zip(found, wanted, strict=True):
    assert isinstance(a, SolutionError) == isinstance(b, SolutionError)
    if not isinstance(a, SolutionError):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", ["qwen_bis10", "qwen3vl_bis10", "internvl_bis10"], indirect=True)
@pytest.mark.parametrize("slots", [10_000, 400, 90])
def test_scores_are_the_same_whatever_is_remembered(make, plain, items, slots):
  """Mutations caught: positions that begin at 0, images that are not in the key, slots that are used
  again while a batch reads them, a memory whose unused slots are seen."""
  scorer, seen = make(slots), []
  for batch in requests_of(items, 0, 8):
    found = solutions.score(scorer, batch)
    assert_same(found, solutions.score(plain, batch))
    seen += [one for one in found if not isinstance(one, SolutionError)]
    assert 0 < scorer.cache.tree.used <= slots
  counts = scorer.cache.counts()
  assert counts["hits"] and counts["misses"] and np.std(np.concatenate(seen)) > 0.01
  assert bool(counts["evicted"]) == (slots < 1000)


def test_on_eight_devices(make, plain, items):
  """Rows over four of them, heads over two."""
  scorer = make(2000, 8)
  for batch in requests_of(items, 1, 2):
    assert_same(solutions.score(scorer, batch), solutions.score(plain, batch))
  assert scorer.cache.hits


def test_one_step_more_computes_that_step_alone(make, items, monkeypatch):
  scorer, ran = make(5000), []
  run = scorer.cache.run
  monkeypatch.setattr(
    scorer.cache, "run", lambda params, batch: ran.append(batch) or run(params, batch)
  )
  one = max(items, key=lambda item: len(item.steps))
  for k in range(1, len(one.steps) + 1):
    solutions.score(scorer, [dataclasses.replace(one, steps=one.steps[:k])])
  assert ["past" in batch for batch in ran] == [False] + [True] * (len(one.steps) - 1)
  measured, _ = scorer._measured(solutions._examples([one]))
  lengths = [(batch["segment_ids"] > 0).sum() for batch in ran]
  assert sum(lengths) == measured.costs[0, 0]
  before = len(ran)
  again = solutions.score(scorer, [one, dataclasses.replace(one, steps=one.steps[:1])])
  assert len(ran) == before and len(again[0]) == len(one.steps)  # nothing is left to compute


def test_solutions_that_wait_together_leave_their_prefix_once(make, items):
  scorer = make(5000)
  steps = [step for one in items for step in one.steps]
  batch = [dataclasses.replace(items[2], steps=(step,)) for step in dict.fromkeys(steps[:12])]
  solutions.score(scorer, batch)
  measured, _ = scorer._measured(solutions._examples(batch))
  own = measured.costs[:, 0] - measured.prefixes
  assert scorer.cache.tree.used == measured.prefixes[0] + own.sum()
  assert (scorer.cache.misses, scorer.cache.hits) == (1, len(batch) - 1)


def test_a_batch_that_fails_leaves_no_wrong_memory(make, plain, items, monkeypatch):
  scorer = make(5000)
  solutions.score(scorer, items[:3])

  def fail(*_):
    raise RuntimeError("the device is gone")

  more = [dataclasses.replace(one, steps=(*one.steps, one.steps[0])) for one in items[:3]]
  with monkeypatch.context() as patched:
    patched.setattr(scorer.cache, "_step", fail)
    with pytest.raises(RuntimeError, match="gone"):
      solutions.score(scorer, more)
  assert scorer.cache.tree.used == 0
  assert_same(solutions.score(scorer, more), solutions.score(plain, more))


def test_a_cache_without_room_is_named(make, monkeypatch):
  scorer = copy.copy(make())

  def full(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(prefix_cache.jnp, "zeros", full)
  with pytest.raises(UserError, match="no room for the model and --cache_mb=64: lower it"):
    scorer.warm_up(64 << 20)


def test_other_parameters_have_no_part_in_it(make):
  scorer = make(100)
  assert scorer.cache and scorer.with_params(scorer._params).cache is None


def test_a_server_says_what_it_remembers(make, items):
  """Mutation caught: hits of a solution that was not remembered."""
  scorer = make(5000)
  served = Served(scorer, server.Limits())
  body = {"question": "Add 1 and 2.", "steps": ["1 + 2 = 3."]}
  first = served.call(body)
  second = served.call(body | {"steps": [*body["steps"], "Final answer: 3"]})
  found = served.call(None, "GET", "/healthz")[1]["cache"]
  text = served.call(None, "GET", "/metrics")[1].decode()
  served.stop()
  assert first[0] == second[0] == 200
  np.testing.assert_allclose(first[1]["scores"], second[1]["scores"][:1], atol=1e-6)
  assert (found["hits"], found["misses"], found["evicted"]) == (1, 1, 0)
  assert 0 < found["reused_tokens"] < found["tokens"] < found["most_tokens"]
  for name, value in (("cache_hits_total", 1), ("cached_tokens", found["tokens"])):
    [shown] = re.findall(rf"^bis_jax_{name} (.*)$", text, re.M)
    assert float(shown) == value


def sample(prefix, steps):
  tokens = np.array([*prefix, *(token for step in steps for token in step)], np.int32)
  ends = len(prefix) + np.cumsum([len(step) for step in steps])
  return Sample(tokens, (ends - 1).astype(np.int32), np.zeros((0, 2), np.int32), 0, len(prefix))


def test_keys_are_of_images_tokens_and_markers():
  one = chain_of(sample([1, 2], [[3, 9], [4, 9]]), "a")
  assert one.ends == [2, 4, 6] and len(set(one.keys)) == 3
  assert chain_of(sample([1, 2], [[3, 9]]), "a").keys == one.keys[:2]
  for other in (
    chain_of(sample([1, 2], [[3, 9], [4, 9]]), "b"),
    chain_of(sample([1, 5], [[3, 9], [4, 9]]), "a"),
  ):
    assert not set(other.keys) & set(one.keys)
  unscored = dataclasses.replace(
    sample([1, 2], [[3, 9, 4, 9]]), markers=np.array([5], np.int32)
  )  # the same tokens, the first 9 no marker
  assert chain_of(unscored, "a").keys[1:] != one.keys[1:2]


def test_slots_are_held_once_and_the_longest_unused_are_given_up():
  """Mutations caught: a prefix is evicted before its steps; pieces of this turn are evicted."""
  rng = np.random.default_rng(0)
  tree, given, parents = PrefixTree(60), collections.Counter(), {}
  for _ in range(300):
    tree.next_turn()
    before, turn = {*tree._pieces}, {}
    for _ in range(rng.integers(1, 4)):
      question, path = rng.integers(5), rng.integers(0, 2, rng.integers(1, 5))
      chain = chain_of(sample([question] * 5, [[k + 10] * 4 for k in path]), "")
      found = tree.find(chain)
      slots, new = tree.add(chain)
      assert len(found) + len(new) <= len(chain.keys)
      assert (slots[: chain.ends[len(found) - 1] if found else 0] == NO_SLOT).all()
      turn |= {id(piece): piece for piece in [*found, *new.values()]}
      parents |= dict(zip(chain.keys[1:], chain.keys, strict=False))
    assert all(parents.get(key, key) in tree._pieces for key in tree._pieces)
    held = np.concatenate([piece.slots for piece in tree._pieces.values()])
    assert len(set(held.tolist())) == len(held) == tree.used <= 60
    assert {*turn} <= {id(piece) for piece in tree._pieces.values()}
    given["evicted"] += len(before - {*tree._pieces})
  assert tree.evicted >= given["evicted"] > 20


def test_the_longest_unused_question_goes_first():
  tree = PrefixTree(20)
  chains = [chain_of(sample([k] * 4, [[10 + k] * 4]), "") for k in range(3)]
  for k in (0, 1, 0, 2):
    tree.next_turn()
    tree.add(chains[k])
  assert [len(tree.find(chain)) for chain in chains] == [2, 1, 2]  # of the second, its step is gone
