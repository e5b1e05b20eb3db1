"""Rows with streams: scores, loss and gradients are those of every rollout alone."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from bis_jax.inputs.rows import device_arrays
from bis_jax.models import backbones
from bis_jax.models.attention import attention, stream_attention
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.internvl.images import InternVLImages
from bis_jax.models.kernels import splash_attention, tokamax_attention
from bis_jax.models.param_tree import merge, split
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.models.qwen2_5_vl.images import QwenImages
from bis_jax.models.qwen3_vl.config import SIZES as QWEN3_SIZES
from bis_jax.models.qwen3_vl.images import Qwen3Images
from bis_jax.parallel.sharding import batch_sharding, make_mesh, parameter_shardings
from bis_jax.training.train_step import loss_and_grads
from tests import streams
from tests.xla_flags import FAST_COMPILATION

MODELS = {
  "qwen": (QWEN_SIZES["tiny"].with_vocabulary(256), QwenImages(28 * 28, 112 * 112)),
  "qwen3": (QWEN3_SIZES["tiny"].with_vocabulary(256), Qwen3Images(32 * 32, 128 * 128)),
  "internvl": (INTERNVL_SIZES["tiny"].with_vocabulary(256), InternVLImages(2, 56)),
}
GROUPS = (3, 1, 20, 2, 7, 1)
BUDGETS, STREAMS = (192, 512, 48), (4, 30)


@functools.cache
def case(name):
  """(model, rollouts, rows with streams, one row for each rollout) as host arrays."""
  model, processor = MODELS[name]
  rollouts = streams.draw(1, processor, GROUPS)
  for one in rollouts[::9]:  # truncated
    kept = len(one.sample.markers) - 1
    if kept:
      end = one.sample.markers[kept - 1] + 1
      sample = one.sample
      one.sample = type(sample)(
        sample.tokens[:end], sample.markers[:kept], sample.image_spans, 1, sample.prefix
      )
      one.targets, one.weights = one.targets[:kept], one.weights[:kept]
  plan = streams.plan_of(rollouts, BUDGETS, STREAMS)
  together = streams.rows_of(processor, rollouts, plan, multiple=8)
  alone = streams.rows_of(processor, rollouts, streams.alone(rollouts, (96, 192, 8)))
  assert plan.padding[0] > 0.05 and len(plan) > 2
  return model, rollouts, together, alone


def of_rollouts(values_BR, batch):
  """{(example, step): value}"""
  used = batch["example_index"] >= 0
  keys = zip(batch["example_index"][used], batch["step_index"][used], strict=True)
  return dict(zip(keys, np.asarray(values_BR)[used], strict=True))


_jitted = jax.jit(loss_and_grads, static_argnums=(0, 4))


def grads(name, batch, mesh=None, normalise="global"):
  mesh = mesh or make_mesh(1, 1, 1, jax.devices()[:1])
  graph, params = split(backbones.build(MODELS[name][0], 0))
  shardings = parameter_shardings(mesh, backbones.sharding(MODELS[name][0]), params)
  rows = {
    key: jax.device_put(array[None], batch_sharding(mesh))
    for key, array in device_arrays(batch).items()
  }
  loss, gradients, _ = _jitted(graph, jax.device_put(params, shardings), {}, rows, normalise)
  return jax.tree.map(np.asarray, (loss, gradients))


@functools.cache
def alone(name):
  return grads(name, case(name)[3])


def assert_close(got, wanted):
  assert abs(got[0] - wanted[0]) <= 1e-5 * abs(wanted[0])
  flat = [np.concatenate([g.ravel() for g in one.values()]) for one in (got[1], wanted[1])]
  assert np.linalg.norm(flat[0] - flat[1]) <= 1e-5 * np.linalg.norm(flat[1])
  for path, gradient in got[1].items():
    reference = np.linalg.norm(wanted[1][path])
    assert np.linalg.norm(gradient - wanted[1][path]) <= 1e-4 * reference + 1e-7, path


@pytest.mark.parametrize("name", MODELS)
def test_scores(name):
  """Mutation caught: a continuation that sees the prefix of another group."""
  model, _, together, single = case(name)
  graph, params = split(backbones.build(model, 0))
  forward = jax.jit(lambda batch: jax.nn.softmax(merge(graph, params)(batch))[..., 0])
  scores = [of_rollouts(forward(device_arrays(b)), b) for b in (together, single)]
  assert scores[0].keys() == scores[1].keys()
  values = np.array([[scores[0][key], scores[1][key]] for key in scores[0]])
  assert np.abs(values[:, 0] - values[:, 1]).max() < 1e-5
  assert values.std() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name):
  assert_close(grads(name, case(name)[2]), alone(name))


@pytest.mark.parametrize(
  "name, shape", [("qwen", (2, 2, 2)), ("qwen3", (1, 4, 2)), ("internvl", (8, 1, 1))]
)
def test_loss_and_gradients_on_eight_devices(name, shape):
  assert_close(grads(name, case(name)[2], make_mesh(*shape)), alone(name))


# Nothing is drawn or computed out of the one program: two processes compile everything anew.
TWO_PROCESSES = """
import sys
from bis_jax.parallel import processes
processes.start()
import jax, numpy as np
jax.config.update("jax_default_matmul_precision", "highest")
from bis_jax.models import backbones
from bis_jax.parallel.sharding import P, batch_share, batch_sharding, make_mesh
from bis_jax.training.train_step import loss_and_grads
mesh, folder = make_mesh(2, 2, 2), sys.argv[1]
part, parts = batch_share(mesh)
graph, shapes = backbones.structure(backbones.get("qwen3_vl").sizes["tiny"].with_vocabulary(256), mesh)
params = {
  path: jax.make_array_from_callback(array.shape, shapes[path].sharding, array.__getitem__)
  for path, array in np.load(f"{folder}/params.npz").items()}
rows = {
  key: jax.make_array_from_process_local_data(
    batch_sharding(mesh), np.split(array, parts)[part][None])
  for key, array in np.load(f"{folder}/rows.npz").items()}
everywhere = jax.sharding.NamedSharding(mesh, P())
step = jax.jit(loss_and_grads, static_argnums=(0, 4), out_shardings=everywhere)
loss, grads, _ = step(graph, params, {}, rows, "global")
if processes.is_first():
  np.savez(f"{folder}/grads.npz", loss=np.asarray(loss), **jax.tree.map(np.asarray, grads))
processes.wait_for_all("end")
"""


def test_loss_and_gradients_on_two_processes(tmp_path):
  """One backbone: which rows a process gives does not depend on it."""
  params = split(backbones.build(MODELS["qwen3"][0], 0))[1]
  np.savez(tmp_path / "params.npz", **params)
  np.savez(tmp_path / "rows.npz", **device_arrays(case("qwen3")[2]))
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  env = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {FAST_COMPILATION}",
    "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).resolve().parents[2]), *sys.path]),
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)]
  started = [subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
  try:
    assert [process.wait(timeout=600) for process in started] == [0, 0]
  finally:
    for process in started:
      process.kill()
  found = dict(np.load(tmp_path / "grads.npz"))
  assert_close((found.pop("loss"), found), alone("qwen3"))


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_crosses_continuations(name):
  """The logits of a rollout have gradient exactly 0 by the tokens of all others but its prefix."""
  model, rollouts, batch, _ = case(name)
  graph, params = split(backbones.build(model, 0))
  row = 0
  batch = {key: array[row : row + 1] for key, array in batch.items()}
  arrays = device_arrays(batch)
  vectors = merge(graph, params).language_model.embed_tokens(arrays["tokens"])

  @jax.jit
  def pull(vectors, weight_BR):
    def logits(vectors):
      decoder = merge(graph, params).language_model
      rope = merge(graph, params).rope(arrays["positions"])
      x = decoder(vectors, rope, arrays["segment_ids"], arrays["stream_ids"].shape[1:])
      return jax.numpy.take_along_axis(x, arrays["marker_index"][..., None], axis=1).sum(axis=-1)

    return jax.vjp(logits, vectors)[1](weight_BR)[0]

  several = 0
  for i in np.unique(batch["example_index"][batch["example_index"] >= 0]):
    mine = batch["example_index"] == i
    by_token = np.abs(np.asarray(pull(vectors, mine.astype(np.float32)))).sum(axis=-1)[0]
    seen = by_token > 0
    assert seen.sum() == len(rollouts[i].sample.tokens)
    assert sorted(batch["tokens"][0][seen]) == sorted(rollouts[i].sample.tokens)
    several += 1
  assert several > 4


@pytest.mark.parametrize("kernel", [splash_attention, tokamax_attention, "xla"])
def test_every_backend(kernel, monkeypatch):
  """Values and gradients against attention of every continuation behind a copy of its prefix."""
  rng = np.random.default_rng(0)
  b, first, (number, length), n, k, h = 2, 140, (3, 90), 4, 2, 16
  t = first + number * length
  q, key, value = (rng.normal(size=(b, t, heads, h)).astype(np.float32) for heads in (n, k, k))
  segments = np.zeros((b, t), np.int32)
  segments[:, :50], segments[:, 50:130] = 1, 2
  own = segments[:, first:].reshape(b, number, length)
  own[:, 0, :30], own[:, 0, 30:80], own[:, 1, :90], own[1, 2, :10] = 1, 2, 2, 1
  used = (segments > 0)[..., None, None]
  if kernel != "xla":
    from bis_jax.models import attention as module

    interpreted = functools.partial(kernel, interpret=True)
    monkeypatch.setitem(module.BACKENDS, "xla", interpreted)

  def ours(q, key, value):
    return stream_attention(q, key, value, segments, (number, length), backend="xla") * used

  def reference(q, key, value):
    scores = np.float32(h**-0.5) * jax.numpy.einsum(
      "btkgh,bskh->bkgts", q.reshape(b, t, k, n // k, h), key
    )
    part = np.concatenate([np.zeros(first, int), 1 + np.repeat(np.arange(number), length)])
    seen = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones((t, t), bool))[None]
    seen &= ((part[None, :] == 0) | (part[:, None] == part[None, :]))[None]
    scores = jax.numpy.where(seen[:, None, None], scores, -1e30)
    out = jax.numpy.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), value)
    return out.reshape(q.shape) * used

  np.testing.assert_allclose(jax.jit(ours)(q, key, value), reference(q, key, value), atol=1e-5)
  weight = rng.normal(size=q.shape).astype(np.float32)
  got, wanted = (
    jax.jit(jax.grad(lambda *x: (f(*x) * weight).sum(), argnums=(0, 1, 2)))(q, key, value)  # noqa: B023
    for f in (ours, reference)
  )
  for a, e in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, e, atol=1e-4)


def test_rows_without_streams_are_those_of_before():
  """One call of attention."""
  q = np.random.default_rng(0).normal(size=(1, 40, 2, 8)).astype(np.float32)
  segments = np.ones((1, 40), np.int32)
  ours = stream_attention(q, q, q, segments, (0, 0), backend="xla")
  assert (ours == attention(q, q, q, segments, causal=True, backend="xla")).all()
