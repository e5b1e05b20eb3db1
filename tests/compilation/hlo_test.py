"""What a program moves and multiplies: of HLO written by hand, and of small programs for TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import SingleDeviceSharding

from bis_jax.compilation import hlo
from bis_jax.parallel.devices import slice_devices

PROGRAM = hlo.Program("""HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%condition (carry: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28), metadata={op_name="while"}
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}, metadata={op_name="a"}
  %hidden = f32[4,8]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused
  %start = (f32[4,8]{1,0}, f32[4,8]{1,0}) collective-permute-start(%x)
  %done = f32[4,8]{1,0} collective-permute-done(%start)
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%i, %done)
}

%fused (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %twice = f32[4,8]{1,0} add(%x, %x)
}

%inside (x: f32[16]) -> f32[4] {
  %x = f32[16]{0} parameter(0)
  %all-reduce.2 = f32[16]{0} all-reduce(%x), to_apply=%add
  ROOT %slice = f32[4]{0} slice(%all-reduce.2), slice={[0:4]}
}

%update (x: f32[64], y: f32[4]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %y = f32[4]{0} parameter(1)
  ROOT %dynamic-update-slice.1 = f32[64]{0} dynamic-update-slice(%x, %y, %i)
}

%elsewhere (x: f32[16]) -> f32[8] {
  %x = f32[16]{0} parameter(0)
  ROOT %all-to-all.1 = f32[16]{0} all-to-all(%x), dimensions={0}, metadata={op_name="b"}
}

ENTRY %main (p: f32[16], q: f32[64]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %loop = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body
  %scattered = f32[4]{0} fusion(%p), kind=kCustom, calls=%inside
  %in_place = f32[64]{0} fusion(%q, %scattered), kind=kLoop, calls=%update
  %offloaded = ((f32[16]{0}), f32[4]{0}, u32[]{:S(2)}) call-start(%p), to_apply=%elsewhere
  %pair = (f32[2]{0}, /*index=1*/f32[2]{0}) reduce-scatter(%p, %p), to_apply=%add
  ROOT %copy = f32[4]{0} copy(%scattered)
}
""")


def test_collectives_in_loops_count_once_per_trip():
  assert PROGRAM.collectives() == {
    "all-gather": (28, 28 * 8 * 8 * 2),
    "all-reduce": (1, 16 * 4),  # inside a fusion
    "all-to-all": (1, 16 * 4),  # on the sparse cores
    "reduce-scatter": (1, 2 * 16 * 4),  # its operands
    "collective-permute": (28, 28 * 4 * 8 * 4),  # not twice
  }


def test_operands_and_results_in_hbm_are_read_and_written():
  """The hidden one is written to vector memory; the update in place moves what it updates."""
  x, gathered = 4 * 8 * 4, 8 * 8 * 2
  assert {name: (calls, moved) for name, calls, moved in PROGRAM.operations()} == {
    "all-gather a": (28, 28 * (x + gathered)),
    "fusion": (28 + 2, 28 * x + (16 + 4) * 4 + (4 + 4) * 4),
    "collective-permute-start": (28, 28 * 2 * x),
    "reduce-scatter": (1, (16 + 16 + 2 + 2) * 4),
    "copy": (1, (4 + 4) * 4),
    "all-to-all b": (1, 2 * 16 * 4),
  }
  assert PROGRAM.operations()[0].name == "all-gather a"


def _update(p, m, v, g):
  m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
  return p - m / (jnp.sqrt(v) + 1e-8), m, v


def _double(x):
  def kernel(x, out):
    out[...] = x[...] * 2

  block = pl.BlockSpec((512, 4096), lambda i: (i, 0))
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return pl.pallas_call(kernel, shape, grid=(16,), in_specs=[block], out_specs=block)(x)


BF16, F32 = jnp.bfloat16, jnp.float32
WIDE, TABLE = (8192, 4096), (65_536, 2048)
PROGRAMS = {
  # function, arguments, bytes and FLOPs by hand
  "matmul": (
    jnp.matmul,
    [((8192, 8192), BF16)] * 2,
    3 * 2 * 8192**2,
    2 * 8192**3,
  ),
  # x stays in vector memory: read once, written once; every layer's weight is read once.
  "scan": (
    lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0],
    [((4096, 4096), BF16), ((6, 4096, 4096), BF16)],
    8 * 2 * 4096**2,
    6 * 2 * 4096**3,
  ),
  "gather": (
    lambda table, rows: table[rows],
    [(TABLE, F32), ((4096,), jnp.int32)],
    2 * 4096 * 2048 * 4 + 4096 * 4,  # not the table
    0,
  ),
  "update": (_update, [((8192, 8192), F32)] * 4, 7 * 4 * 8192**2, 0),
  "kernel": (_double, [(WIDE, BF16)], 2 * 2 * 8192 * 4096, 0),
}


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs: pip install -e '.[tpu]'"
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_small_programs_move_the_bytes_known_by_hand(name):
  function, arguments, moved, flops = PROGRAMS[name]
  device = SingleDeviceSharding(slice_devices("v6e:2x2")[0])
  shapes = [jax.ShapeDtypeStruct(*argument, sharding=device) for argument in arguments]
  with jax.default_matmul_precision("default"):
    text = jax.jit(function).lower(*shapes).compile().as_text()
  program = hlo.Program(text)
  assert program.hbm_bytes() == pytest.approx(moved, rel=0.01)
  assert program.matmul_flops() == flops
