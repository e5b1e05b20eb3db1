"""The compiler's plan against the whole program, and the process that it is made in."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from bis_jax.compilation import hlo, plan
from bis_jax.errors import UserError
from bis_jax.parallel.devices import TopologyError, slice_devices


def _lowered(rows):
  device = SingleDeviceSharding(slice_devices("v6e:2x2")[0])
  shapes = [jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16, sharding=device)] * 2
  return jax.jit(lambda x, y: jax.nn.softmax(x @ y.T) @ y).lower(*shapes)


def _both(rows):
  return plan.planned(_lowered(rows)), plan.whole(_lowered(rows))


def _planned(rows):
  return plan.planned(_lowered(rows))


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs: pip install -e '.[tpu]'"
)


@needs_libtpu
def test_a_plan_is_the_whole_program_without_machine_code():
  planned, whole = plan.in_child(_both, 16_384)
  assert planned.code == 0 < whole.code
  assert planned.total == whole.total - whole.code
  ours, theirs = hlo.Program(planned.text), hlo.Program(whole.text)
  assert ours.operations() == theirs.operations() and ours.matmul_flops() == theirs.matmul_flops()


@needs_libtpu
def test_a_program_that_does_not_fit_is_the_compilers_error():
  with pytest.raises(jax.errors.JaxRuntimeError, match="exceeds available HBM"):
    plan.in_child(_planned, 524_288)


def _fails():
  raise TopologyError("no such slice")


def test_an_error_of_the_child_is_raised_here():
  with pytest.raises(TopologyError, match="no such slice"):
    plan.in_child(_fails)


def test_a_child_that_dies_is_named():
  with pytest.raises(UserError, match="the TPU compiler ended with 3: it may need more memory"):
    plan.in_child(os._exit, 3)
