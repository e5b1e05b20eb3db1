"""LoRA: what trains and is saved, gradients against full training, resuming, merging, refusals."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import PartitionSpec as P

from bis_jax.errors import UserError
from bis_jax.export import export_run
from bis_jax.models import adaptation, backbones, learning_rates
from bis_jax.models.adaptation import MARKER_PATH, is_adapter, merged
from bis_jax.models.hub_layout import EMBEDDING_PATH, REWARD_HEAD_PATH
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.model_config import Adaptation
from bis_jax.models.model_flops import step_flops, trained_stages
from bis_jax.models.param_tree import merge, split
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.models.qwen3_vl.config import SIZES as QWEN3_SIZES
from bis_jax.parallel.sharding import batch_sharding, make_mesh
from bis_jax.run import stages
from bis_jax.scoring.restore import load_run
from bis_jax.settings import config_check
from bis_jax.training.train_state import split_trainable
from bis_jax.training.train_step import loss_and_grads
from configs import common

pytestmark = pytest.mark.usefixtures("programs_once", "no_plots")

RULES = (("visual", 0.0), (r"language_model\.", "lora"), (".*", 1.0))
MARKER = 7
LORA = Adaptation(RULES, "float32", rank=4, alpha=8.0, dropout=0.0, marker_token=MARKER)
PLAIN = QWEN_SIZES["tiny"].with_vocabulary(256)
MODEL = dataclasses.replace(PLAIN, adaptation=LORA)
ROWS, TOKENS, MARKERS = 8, 64, 6


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
  """Eight rows of one sample with an image; every fourth token is a step marker."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(8, 256, (ROWS, TOKENS), dtype=np.int32)
  tokens[:, 23::4] = MARKER
  image = np.full((ROWS, TOKENS), -1, np.int32)
  image[:, 2:18] = np.arange(16)
  return {
    "tokens": tokens,
    "segment_ids": np.ones((ROWS, TOKENS), np.int32),
    "positions": np.arange(TOKENS, dtype=np.int32)[None, None].repeat(ROWS, 0).repeat(3, 1),
    "image_index": image,
    "patches": rng.normal(size=(ROWS, 64, 1176)).astype(np.float32),
    "patch_segment": np.ones((ROWS, 64), np.int32),
    "patch_window": np.ones((ROWS, 64), np.int32),
    "patch_position": rng.integers(0, 8, (ROWS, 64, 2), dtype=np.int32),
    "marker_index": np.arange(23, 23 + 4 * MARKERS, 4, dtype=np.int32)[None].repeat(ROWS, 0),
    "marker_rollout": np.ones((ROWS, MARKERS), np.int32),
    "marker_target": rng.integers(0, 2, (ROWS, MARKERS)).astype(np.float32),
    "marker_weight": np.ones((ROWS, MARKERS), np.float32),
  }


def _config(rules=RULES, **changes):
  c = common.get_config()
  c.model.size, c.model.learning_rates = "tiny", rules
  c.update_from_flattened_dict({"lora.rank": 4, "lora.alpha": 8.0} | changes)
  return c


_jitted = jax.jit(loss_and_grads, static_argnums=(0, 4))


def _grads(model, batch, mesh=None, random=None):
  """Returns (loss, gradients of what trains) of the batch, as numpy."""
  mesh = mesh or make_mesh(1, 1, 1, jax.devices()[:1])
  graph, params = split(backbones.build(model, 0))
  for path, noise in (random or {}).items():
    params[path] = noise
  _, shapes = backbones.structure(model, mesh)
  params = jax.device_put(params, {path: shapes[path].sharding for path in params})
  factor = learning_rates.factors(
    _config() if model.adaptation else _config(((".*", 1.0),)), params
  )
  trained, frozen = split_trainable(params, factor)
  rows = {k: jax.device_put(a[None], batch_sharding(mesh)) for k, a in batch.items()}
  loss, grads, _ = _jitted(graph, trained, frozen, rows, "global")
  return jax.tree.map(np.asarray, (loss, grads))


def _close(one, other, tolerance):
  return np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def test_marker_row_and_head_have_the_gradient_of_full_training(batch):
  """And adapters that of their kernels: dA = 0 and dB = scale A^T dW for a new adapter."""
  loss, grads = _grads(MODEL, batch)
  whole_loss, whole = _grads(PLAIN, batch)
  assert loss == pytest.approx(whole_loss, rel=1e-6)
  assert np.linalg.norm(grads[MARKER_PATH]) > 1e-6 < np.linalg.norm(grads[REWARD_HEAD_PATH])
  # The marker's row starts as the table's, so the state is the same.
  assert _close(grads[MARKER_PATH], whole[EMBEDDING_PATH][MARKER], 1e-5)
  assert _close(grads[REWARD_HEAD_PATH], whole[REWARD_HEAD_PATH], 1e-5)
  stem = "language_model.layers.mlp.up_proj"
  a = np.asarray(split(backbones.build(MODEL, 0))[1][f"{stem}.lora.lora_a"])
  wanted = 8 / 4 * np.swapaxes(a, 1, 2) @ whole[f"{stem}.kernel"]
  assert _close(grads[f"{stem}.lora.lora_b"], wanted, 1e-4)
  assert not grads[f"{stem}.lora.lora_a"].any()
  assert {p for p in grads if not is_adapter(p)} == {REWARD_HEAD_PATH}


def _noise(model):
  rng = np.random.default_rng(1)
  shapes = backbones.shapes(model)[1]
  return {
    p: rng.normal(0, 0.1, s.shape).astype(np.float32) for p, s in shapes.items() if is_adapter(p)
  }


@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_eight_devices_agree_with_one_and_split_the_adapters(batch, dtype):
  mesh, own = make_mesh(2, 2, 2), dataclasses.replace(LORA, dtype=dtype)
  model = dataclasses.replace(PLAIN, adaptation=own)
  loss, grads = _grads(model, batch, mesh, _noise(MODEL))
  alone_loss, alone = _grads(model, batch, random=_noise(MODEL))
  assert loss == pytest.approx(alone_loss, rel=1e-5)
  assert all(_close(grads[path], alone[path], 1e-4) for path in alone)
  _, shapes = backbones.structure(MODEL, mesh)
  stem = "language_model.layers.self_attn.o_proj.lora"
  assert shapes[f"{stem}.lora_a"].sharding.spec == P(None, "tensor", None)
  assert shapes[f"{stem}.lora_b"].sharding.spec == P(None, None, "fsdp")


@pytest.mark.parametrize(
  "plain",
  [
    PLAIN,
    QWEN3_SIZES["tiny"].with_vocabulary(256),
    INTERNVL_SIZES["tiny"].with_vocabulary(256),
  ],
  ids=lambda config: config.backbone,
)
def test_merged_parameters_are_the_same_function(plain, batch):
  """At most 1e-5 on the logits, with adapters on every kernel, the tower's too."""
  own = dataclasses.replace(LORA, rules=((".*kernel", "lora"), (EMBEDDING_PATH, "lora"), (".*", 1)))
  model = dataclasses.replace(plain, adaptation=own)
  if plain.backbone == "internvl":
    values = plain.vision.side**2 * 4, plain.vision.patch_values
    patches = np.random.default_rng(0).normal(size=(ROWS, *values)).astype(np.float32)
    batch = batch | {"patches": patches, "positions": batch["positions"][:, 0]}
  if plain.backbone == "qwen3_vl":
    patches = np.random.default_rng(0).normal(size=(ROWS, 64, 1536)).astype(np.float32)
    batch = batch | {"patches": patches, "patch_grid": np.full((ROWS, 64, 2), 8, np.int32)}
  graph, params = split(backbones.build(model, 0))
  params |= {path: value for path, value in _noise(model).items()}
  for path, value in params.items():
    if value.dtype != np.float32 or "lora" in path:
      params[path] = 0.3 * value  # adapters as large as what they adapt, and no larger
  run = jax.jit(lambda graph, params: merge(graph, params)(batch), static_argnums=0)
  ours = run(graph, params)
  whole = run(split(backbones.build(plain, 0))[0], merged(params, own))
  base = {path: value for path, value in params.items() if not is_adapter(path)}
  assert np.abs(ours - whole).max() <= 1e-5 * np.abs(whole).max()
  assert np.abs(run(split(backbones.build(plain, 0))[0], base) - whole).max() > 1e-2


def test_dropout_changes_with_the_key_and_is_off_without_one(batch):
  model = dataclasses.replace(MODEL, adaptation=dataclasses.replace(LORA, dropout=0.5))
  assert model.needs_random_key and not MODEL.needs_random_key
  graph, params = split(backbones.build(model, 0))
  params |= _noise(MODEL)
  run = jax.jit(
    lambda key: merge(graph, params)(batch | ({} if key is None else {"random_key": key}))
  )
  first, again, other, off = (
    np.asarray(run(key)) for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)
  )
  assert (first == again).all() and np.abs(first - other).max() > 1e-4 < np.abs(first - off).max()
  plain = np.asarray(jax.jit(merge(split(backbones.build(MODEL, 0))[0], params))(batch))
  np.testing.assert_allclose(off, plain, atol=1e-4)
  keys = merge(graph, params)
  adaptation.draw_dropout(keys, jax.random.key(0))
  drawn = jax.random.key_data(keys.language_model.layers.mlp.up_proj.dropout_key)
  assert len(np.unique(drawn, axis=0)) == PLAIN.text.num_hidden_layers


def test_model_flops_count_two_products_of_adapted_kernels():
  """The gradient of a frozen kernel is not computed; a full run computes three."""
  rules = (("visual", 0.0), (r"language_model\.", "lora"), (".*", 1.0))
  own = dataclasses.replace(LORA, rules=rules, rank=16)
  config = dataclasses.replace(QWEN_SIZES["7b"], adaptation=own)
  c = _config(rules, **{"model.size": "7b", "lora.rank": 16})
  trained = trained_stages(config, learning_rates.factors(c, backbones.shapes(config)[1]))
  assert trained == set()
  flops = step_flops(config, trained, [100.0], [256.0])
  adapters = 28 * 16 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
  assert flops["text"] == 2 * 100 * (2 * 28 * 233_046_016 + 3 * adapters)
  plain = step_flops(QWEN_SIZES["7b"], set(), [], [256.0])
  assert flops["vision attention"] == plain["vision attention"]


@pytest.mark.parametrize(
  ("rules", "changes", "words"),
  [
    ((("visual", 0.0), (".*", "lora")), {}, "reward_head.kernel must have a factor above 0"),
    (
      (("embed_tokens", 0), ("reward_head", 1), (".*", "lora")),
      {},
      "freezes the step marker's embedding",
    ),
    (((r"layers.*scale$", "lora"), (".*", 1.0)), {}, "adapts no kernel"),
    (((".*", "qlora"),), {}, "a factor >= 0 or 'lora'"),
    (((".*", 1.0),), {"lora.dropout": 0.1}, "config.lora.dropout is 0.1, but no rule"),
    (((".*", 1.0),), {"model.frozen_dtype": "bfloat16"}, "frozen_dtype is 'bfloat16', but no rule"),
  ],
)
def test_rules_that_train_no_marker_or_head_are_refused(rules, changes, words):
  c = common.get_config()
  c.model.learning_rates = rules
  c.update_from_flattened_dict(changes)
  with pytest.raises(config_check.ConfigError, match=words):
    config_check.check(c)


def test_the_summary_counts_adapters():
  c = _config()
  _, shapes = backbones.shapes(dataclasses.replace(MODEL, adaptation=LORA))
  words = learning_rates.summary(c, shapes)
  size = sum(int(np.prod(s.shape)) for path, s in shapes.items() if is_adapter(path))
  assert f"{size:,} in adapters and the step marker's row" in words
  assert f"{size + 2 * PLAIN.text.hidden_size:,} of " in words


@pytest.fixture(scope="module")
def config(small_config):
  with small_config.unlocked():
    c = small_config.copy_and_resolve_references()
  c.unlock()
  c.model.learning_rates = (
    ("visual.patch", 0.0),
    (r"language_model\.|blocks", "lora"),
    (".*", 1.0),
  )
  c.model.frozen_dtype, c.lora.rank, c.lora.dropout = "bfloat16", 4, 0.1
  c.optim.learning_rate = 1e-2
  c.train.steps, c.train.checkpoint_every, c.evaluation.benchmark = 4, 2, ""
  return c


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("lora") / "run"
  stages.run(config, str(folder))
  return folder


def _state(folder, step=4):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder / "checkpoints" / str(step) / "state")


def test_a_checkpoint_holds_adapters_and_what_else_trains(run):
  assert not (run / "frozen").exists()
  params = _state(run)["params"]
  whole = {path for path in params if not is_adapter(path)}
  assert whole == {REWARD_HEAD_PATH} | {p for p in whole if p.startswith("visual.merger")}
  assert MARKER_PATH in params and "visual.blocks.attn.qkv.lora.lora_a" in params
  before = _state(run, 2)["params"]
  assert all((before[path] != params[path]).any() for path in params)


def test_it_resumes_bit_equal(run, config, tmp_path):
  """With dropout, whose masks are a function of the step."""
  other = tmp_path / "again"
  shutil.copytree(run, other)
  shutil.rmtree(other / "checkpoints" / "4")
  stages.run(config, str(other))
  ours, theirs = jax.tree.leaves(_state(run)), jax.tree.leaves(_state(other))
  assert all(map(np.array_equal, ours, theirs)) and len(ours) > 20


def test_a_changed_base_is_refused(run, config, tmp_path):
  """Adapters beside another base would score without a word."""
  other = tmp_path / "again"
  shutil.copytree(run, other)
  saved = json.loads((other / "config.json").read_text())
  saved["pretrain"]["steps"] = 0  # starts from random parameters
  (other / "config.json").write_text(json.dumps(saved))
  with pytest.raises(UserError, match=r"is not what the run in .* started from: put the weights"):
    load_run(str(other))


def test_base_and_adapter_score_as_the_run_did_and_as_the_merged_export(run, tmp_path):
  """At most 1e-5 between base + adapter and the export, in float32."""
  loaded = load_run(str(run))
  assert any(map(is_adapter, loaded.params))
  out = tmp_path / "export"
  export_run(str(run), epath.Path(out), "float32", "")
  again = load_run(str(out))
  assert not any(map(is_adapter, again.params))
  whole = merged(loaded.params, loaded.model.adaptation)
  for path, value in again.params.items():
    ours = np.asarray(whole[path], np.float32)
    np.testing.assert_allclose(value, ours, rtol=0, atol=1e-6, err_msg=path)
