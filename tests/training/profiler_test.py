"""One program per run: compiled once for all images, cached on disk, and traced unchanged."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bis_jax.inputs import pipeline
from bis_jax.run import stages
from bis_jax.settings import keys
from bis_jax.training.examples import RolloutExamples
from configs import qwen_bis10

pytestmark = pytest.mark.usefixtures("programs_once")

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT, FOLDER = "jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir"


@pytest.fixture(scope="module")
def config(small_config, tmp_path_factory):
  """Four steps, without pre-training and evaluation."""
  c = small_config.copy_and_resolve_references()
  with c.unlocked():
    c.pretrain.steps, c.train.steps, c.train.checkpoint_every = 0, 4, 4
    c.evaluation.benchmark = ""
    c.train.compile_cache = str(tmp_path_factory.mktemp("compiled"))
  return c


class MixedExamples(RolloutExamples):
  """The corpus with pictures of many sizes: 28 to 140 pixels wide and high, by their number."""

  def __getitems__(self, indices) -> list[pipeline.Example]:
    return list(map(self._resized, indices, super().__getitems__(indices)))

  def _resized(self, i: int, example: pipeline.Example) -> pipeline.Example:
    sizes = [(28 + i % 5 * 28, 28 + i % 3 * 56) for _ in example.image_sizes]
    images = []
    for data, (height, width) in zip(example.read_images(), sizes, strict=True):
      with io.BytesIO() as file:
        PIL.Image.open(io.BytesIO(data)).resize((width, height)).save(file, "PNG")
        images.append(file.getvalue())
    return dataclasses.replace(example, image_sizes=sizes, read_images=lambda: images)


class Ran(NamedTuple):
  """Workdirs of a plain run and one with a trace; what both compiled; the batches of the plain one."""

  plain: pathlib.Path
  profiled: pathlib.Path
  compiled: list[str]
  batches: list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def ran(config, own_programs, tmp_path_factory) -> Ran:
  """Runs twice with one cache on disk; without programs of other tests."""
  compiled, batches = [], []

  def hear(event: str, _: float, **labels: str) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(labels["fun_name"])

  take = pipeline.BatchIterator.__next__
  before = {name: getattr(jax.config, name) for name in (LIMIT, FOLDER)}
  folder = tmp_path_factory.mktemp("runs")
  compilation_cache.reset_cache()
  jax.config.update(LIMIT, 0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stages, "RolloutExamples", MixedExamples)
    with patch.context() as inner:
      inner.setattr(
        pipeline.BatchIterator, "__next__", lambda self: batches.append(take(self)) or batches[-1]
      )
      jax.monitoring.register_event_duration_secs_listener(hear)
      stages.run(config, str(folder / "plain"))
      jax.monitoring.unregister_event_duration_listener(hear)
    with config.unlocked():
      config.train.profile_steps = (2, 2)
    stages.run(config, str(folder / "profiled"))
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  return Ran(folder / "plain", folder / "profiled", compiled, batches)


def test_a_run_over_mixed_sizes_and_lengths_compiles_one_step(ran):
  for key in ("patch_segment", "segment_ids"):
    lengths = [np.unique(batch[key], return_counts=True)[1] for batch in ran.batches]
    assert len({tuple(length) for length in lengths}) == 4
  assert sum("train_step" in name for name in ran.compiled) == 1, ran.compiled


def test_another_process_finds_the_step_on_disk(ran, config, tmp_path):
  ours, recipe = (
    keys.flatten(json.loads(c.to_json())) for c in (config, qwen_bis10.get_config("toy"))
  )
  ours["train.profile_steps"] = recipe["train.profile_steps"]
  changes = [f"--config.{key}={value}" for key, value in ours.items() if recipe[key] != value]
  found = False
  with subprocess.Popen(
    [sys.executable, "-m", "bis_jax.main", "--config=configs/qwen_bis10.py:toy"]
    + [f"--workdir={tmp_path / 'run'}", *changes],
    cwd=ROOT,
    env=os.environ
    | {LIMIT.upper(): "0", "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    | {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    lines = []
    for line in process.stderr:
      lines.append(line)
      if found := "cache hit for 'jit_train_step'" in line:
        process.kill()  # the rest of the run is of no interest
        break
  assert found, "".join(lines)[-2000:]
  assert len(list(pathlib.Path(config.train.compile_cache).glob("jit_train_step-*"))) == 1


def test_a_trace_appears_and_changes_nothing(ran):
  traces = list((ran.profiled / "profile").glob("plugins/profile/*/*.xplane.pb"))
  assert len(traces) == 1 and b"train_step" in traces[0].read_bytes()
  assert not (ran.plain / "profile").exists()
  jax.tree.map(np.testing.assert_array_equal, _state(ran.profiled), _state(ran.plain))


def _state(folder: pathlib.Path):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder / "checkpoints" / "4" / "state")
