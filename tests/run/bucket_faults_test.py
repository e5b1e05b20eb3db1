"""A bucket that fails for seconds is survived; one that stays away ends the run; nothing is lost."""

import asyncio
import itertools
import json

import jax
import numpy as np
import pytest
from etils import epath

from bis_jax.inputs.pipeline import BatchIterator
from bis_jax.parallel import ownership
from bis_jax.run import stages
from bis_jax.training.checkpoint import Checkpoints
from tests.bucket_server import Fault

STEPS = 6


@pytest.fixture(scope="module")
def whole_arrays():
  """Not here: every device writes its part, as in a run of a user."""


@pytest.fixture(scope="module")
def config(small_config, bucket_server):
  c = small_config.copy_and_resolve_references()
  with c.unlocked():
    c.corpus.cache = "gs://bis-jax/faults/cache"
    c.evaluation.benchmark = ""
    c.pretrain.steps = 0
    c.corpus.workers = 1
    c.inputs.prefetch = 1
  return c


@pytest.fixture(scope="module")
def unbroken(config) -> dict[str, np.ndarray]:
  """The parameters of a run without faults."""
  stages.run(config, "gs://bis-jax/faults/unbroken")
  return _result("unbroken")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
  """Retries wait for milliseconds, and the owner that this process was counts as dead soon."""
  sleep = asyncio.sleep
  monkeypatch.setattr(ownership, "_SILENCE", 1.0)
  monkeypatch.setattr(asyncio, "sleep", lambda seconds, *args: sleep(seconds / 1000, *args))


def _result(name: str) -> dict[str, np.ndarray]:
  """Returns the last losses and parameters of a run; every step was logged once."""
  folder = epath.Path("gs://bis-jax/faults") / name
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  with Checkpoints(folder, every=1, keep=2) as checkpoints:
    state = checkpoints._manager.restore(STEPS)["state"]
  found = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found} | {
    "losses": np.array([line["loss"] for line in lines])
  }


def _assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
  assert ours.keys() == theirs.keys() and len(ours) > 20
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_failures_of_seconds_are_survived(config, unbroken, bucket_server, monkeypatch):
  """Every ninth request is refused, answered with 503 or 429, slow, or torn in the middle."""
  kinds = itertools.cycle([Fault(status=503), Fault(cut=True), Fault(status=429), Fault(delay=0.5)])
  count = itertools.count(1)
  monkeypatch.setattr(
    bucket_server, "fault", lambda *_: next(kinds) if next(count) % 9 == 0 else Fault()
  )
  stages.run(config, "gs://bis-jax/faults/shaken")
  assert next(count) > 90
  monkeypatch.undo()
  _assert_equal(_result("shaken"), unbroken)


@pytest.mark.parametrize("at", [1, STEPS - 1])
def test_a_bucket_that_stays_away_ends_the_run_and_loses_nothing(
  config, unbroken, bucket_server, monkeypatch, at
):
  """From batch `at` on nothing is answered: while records are read, or a checkpoint is saved."""
  name, take = f"away{at}", BatchIterator.__next__

  def take_or_break(iterator):
    if iterator.next_batch == at:
      bucket_server.stop()
    return take(iterator)

  with monkeypatch.context() as patch:
    patch.setattr(BatchIterator, "__next__", take_or_break)
    try:
      with pytest.raises(ConnectionError, match="gs://bis-jax can't be reached .* again") as raised:
        stages.run(config, f"gs://bis-jax/faults/{name}")
      assert "\n" not in str(raised.value)
      with pytest.raises(ConnectionError, match="can't be reached"):  # nor does it start
        stages.run(config, f"gs://bis-jax/faults/{name}")
    finally:
      bucket_server.start()
  stages.run(config, f"gs://bis-jax/faults/{name}")
  _assert_equal(_result(name), unbroken)


def test_a_checkpoint_that_cannot_be_fetched_is_not_taken_for_damaged(
  config, unbroken, bucket_server, monkeypatch
):
  with bucket_server.failing(name="unbroken/checkpoints/6/state", status=503):
    with pytest.raises(ConnectionError, match="can't be reached"):
      stages.run(config, "gs://bis-jax/faults/unbroken")
  assert not (epath.Path("gs://bis-jax/faults/unbroken") / "damaged").exists()
  _assert_equal(_result("unbroken"), unbroken)
