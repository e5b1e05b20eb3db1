"""QLoRA: frozen kernels in 8 and 4 bits, their error, their gradients, their place on devices."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from bis_jax.export import export_run
from bis_jax.models import adaptation, backbones, learning_rates, quantization
from bis_jax.models.adaptation import is_adapter, merged
from bis_jax.models.model_config import Adaptation
from bis_jax.models.param_tree import split
from bis_jax.models.qwen2_5_vl.config import SIZES
from bis_jax.parallel.sharding import make_mesh
from bis_jax.run import stages
from bis_jax.scoring.restore import load_run
from bis_jax.training import checkpoint

pytestmark = pytest.mark.usefixtures("programs_once")

RULES = (("visual", 0.0), (r"language_model\.", "lora"), (".*", 1.0))
PLAIN = SIZES["tiny"].with_vocabulary(256)
# The largest error of a value, in units of the largest of its block: half of a step, or of the widest
# gap between NF4 values, and the rounding of the scale to bfloat16.
ERRORS = {"int8": 0.5 / 127.5 + 2**-8, "nf4": 0.152 + 2**-8}
TYPES = {"int8": jnp.int8, "nf4": jnp.uint4}


def _model(dtype):
  own = Adaptation(RULES, dtype, rank=4, alpha=8.0, dropout=0.0, marker_token=7)
  return dataclasses.replace(PLAIN, adaptation=own)


@pytest.mark.parametrize("dtype", quantization.DTYPES)
def test_the_error_is_that_of_the_blocks(dtype):
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(3, 120, 32)), jnp.float32)  # blocks of 60
  values, scale = quantization.quantized(kernel, dtype)
  assert (values.dtype, scale.dtype, scale.shape) == (TYPES[dtype], jnp.bfloat16, (3, 2, 32))
  back = quantization.dequantized(values, scale, "float32")
  largest = jnp.abs(kernel).reshape(3, 2, 60, 32).max(axis=2).repeat(60, axis=1)
  error = jnp.abs(back - kernel) / largest
  assert float(error.max()) <= ERRORS[dtype] and float(error.max()) > 0.3 * ERRORS[dtype]


@pytest.mark.parametrize("dtype", quantization.DTYPES)
def test_frozen_kernels_alone_are_quantized_and_split_like_kernels(dtype):
  mesh = make_mesh(2, 2, 2)
  _, shapes = backbones.structure(_model(dtype), mesh)
  _, plain = backbones.structure(PLAIN, mesh)
  for path, shape in shapes.items():
    if path.endswith(quantization.SCALE):
      kernel = path.replace(quantization.SCALE, ".kernel")
      assert shapes[kernel].dtype == TYPES[dtype]
      assert shapes[kernel].sharding == plain[kernel].sharding and shape.dtype == jnp.bfloat16
    elif path not in ("reward_head.kernel", *filter(is_adapter, shapes)):
      assert shape.dtype in (jnp.bfloat16, TYPES[dtype]), path
  factors = learning_rates.factors(_config_of(dtype), shapes)
  scales = [path for path in shapes if path.endswith(quantization.SCALE)]
  assert len(scales) > 10 and all(factors[path] == 0 for path in scales)


def _config_of(dtype):
  from configs import common

  c = common.get_config()
  c.model.size, c.model.learning_rates, c.model.frozen_dtype = "tiny", RULES, dtype
  return c


@pytest.mark.parametrize("dtype", quantization.DTYPES)
def test_a_checkpoint_is_quantized_as_the_model_that_is_built(dtype):
  """Reading float kernels and quantizing them gives what `build` quantizes, and the same checksums."""
  model = _model(dtype)
  mesh = make_mesh(1, 2, 2, jax.devices()[:4])
  _, shapes = backbones.structure(model, mesh)
  whole = split(backbones.build(PLAIN, 0))[1]
  whole = {path: value.astype(jnp.bfloat16) for path, value in whole.items()}
  stored = adaptation.stored_shapes(shapes)
  read = {p: jax.device_put(whole[p].astype(s.dtype), s.sharding) for p, s in stored.items()}
  ours = adaptation.quantized(read, shapes)
  assert set(ours) == {path for path in shapes if not is_adapter(path)}
  assert all(ours[path].dtype == shapes[path].dtype for path in ours)
  kernel = "language_model.layers.mlp.up_proj.kernel"
  wanted, _ = quantization.quantized(whole[kernel], dtype)
  np.testing.assert_array_equal(np.asarray(ours[kernel]), np.asarray(wanted))
  sums = checkpoint.checksums(ours)
  ours[kernel] = ours[kernel].at[0, 0, 0].add(jnp.ones((), ours[kernel].dtype))
  changed = checkpoint.checksums(ours)
  assert {path for path in sums if sums[path] != changed[path]} == {kernel}


def _state(folder):
  with ocp.StandardCheckpointer() as checkpointer:
    return jax.tree.leaves(checkpointer.restore(folder / "checkpoints/2/state"))


def test_a_run_in_nf4_resumes_bit_equal_scores_and_merges(small_config, tmp_path):
  with small_config.unlocked():
    c = small_config.copy_and_resolve_references()
  c.unlock()
  c.model.learning_rates, c.model.frozen_dtype, c.lora.rank = RULES, "nf4", 4
  c.train.steps, c.train.checkpoint_every, c.evaluation.benchmark = 2, 1, ""
  folder = tmp_path / "run"
  stages.run(c, str(folder))
  again = tmp_path / "again"
  shutil.copytree(folder, again)
  shutil.rmtree(again / "checkpoints/2")
  stages.run(c, str(again))
  ours, theirs = _state(folder), _state(again)
  assert len(ours) > 20 and all(map(np.array_equal, ours, theirs))
  loaded = load_run(str(folder))  # refuses a base of other checksums
  kernels = [path for path, value in loaded.params.items() if value.dtype == jnp.uint4]
  assert len(kernels) > 10
  export_run(str(folder), epath.Path(tmp_path / "out"), "float32", "")
  again = load_run(str(tmp_path / "out")).params
  whole = merged(loaded.params, loaded.model.adaptation)
  assert all(np.abs(np.asarray(again[p], np.float32) - whole[p]).max() < 1e-6 for p in again)
