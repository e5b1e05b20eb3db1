"""InternVL's weights: three layouts in, the new marker row, strictness, export, and exact counts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import InternVLConfig as TorchConfig
from transformers import InternVLForConditionalGeneration

from bis_jax.hub import weights
from bis_jax.models import param_tree
from bis_jax.models.hub_layout import EMBEDDING_PATH, REWARD_HEAD_PATH
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.internvl.config import InternVLConfig
from bis_jax.models.internvl.model import InternVL

VOCAB, YES, NO = 512, 11, 12
KWARGS = {"yes_token": YES, "no_token": NO, "marker_token": None}


def tiny(vocab_size, architecture):
  """The tiny InternVL with one of the two published decoders."""
  config = INTERNVL_SIZES["tiny"].with_vocabulary(vocab_size)
  return dataclasses.replace(
    config, text=dataclasses.replace(config.text, architecture=architecture)
  )


def _shapes(config, sharding=None):
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _, shapes = param_tree.split(nnx.eval_shape(lambda: InternVL(config, nnx.Rngs(0))))
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def _random(config, seed=0):
  rng = np.random.default_rng(seed)
  return {
    path: jax.device_put(rng.normal(size=s.shape).astype(np.float32))
    for path, s in _shapes(config).items()
  }


def _write(folder, config, params, layout="hub"):
  """A checkpoint of random parameters, by our own export, in a layout."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config.to_hugging_face(layout)))
  weights.save(
    folder, params, config, yes_token=YES, no_token=NO, base=None, dtype="float32",
    max_file_bytes=100_000,
  )  # fmt: skip


def _tensors(folder):
  found = {}
  for file in folder.glob("*.safetensors"):
    with safe_open(file, "pt") as opened:
      found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
  return found


def _assert_equal(a, b):
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.mark.parametrize(
  ("architecture", "layout"), [("internlm2", "hub"), ("qwen2", "hub"), ("qwen2", "hf")]
)
def test_export_and_load_give_the_same_parameters(tmp_path, architecture, layout):
  """Whole and over 4 x 2 devices, whose shards cut the fused tensors at any row."""
  config = tiny(VOCAB, architecture)
  params = _random(config)
  _write(tmp_path, config, params, layout)
  _assert_equal(weights.load(tmp_path, config, _shapes(config), **KWARGS), params)
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
  shapes = {}
  for path, shape in _shapes(config).items():
    spec = ("tensor", "fsdp") if len(shape.shape) == 2 else (None, "fsdp", "tensor")
    axes = [
      axis if axis and n % mesh.shape[axis] == 0 else None
      for axis, n in zip(spec, shape.shape, strict=False)
    ]
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    shapes[path] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
  _assert_equal(weights.load(tmp_path, config, shapes, **KWARGS), params)


def test_transformers_loads_the_hf_layout_and_its_own_names_in_memory_load_too(tmp_path):
  config = tiny(VOCAB, "qwen2")
  params = _random(config)
  _write(tmp_path, config, params, "hf")
  _, report = InternVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  model = InternVLForConditionalGeneration.from_pretrained(tmp_path)
  in_memory = tmp_path / "memory"
  in_memory.mkdir()
  save_file({k: v.clone() for k, v in model.state_dict().items()}, in_memory / "model.safetensors")
  (in_memory / "config.json").write_text((tmp_path / "config.json").read_text())
  _assert_equal(weights.load(in_memory, config, _shapes(config), **KWARGS), params)
  own = tmp_path / "own"
  model.save_pretrained(own)
  _assert_equal(weights.load(own, config, _shapes(config), **KWARGS), params)


@pytest.mark.parametrize("architecture", ["internlm2", "qwen2"])
def test_the_marker_is_a_new_row_the_mean_of_the_others(tmp_path, architecture):
  """A published table has one row fewer; an exported one has them all and keeps the trained row."""
  published = tiny(VOCAB, architecture)
  grown = tiny(VOCAB + 1, architecture)
  before = _random(published)
  _write(tmp_path / "published", published, before)
  kwargs = {**KWARGS, "marker_token": VOCAB}
  loaded = weights.load(tmp_path / "published", grown, _shapes(grown), **kwargs)
  table = np.asarray(loaded[EMBEDDING_PATH])
  np.testing.assert_array_equal(table[:VOCAB], np.asarray(before[EMBEDDING_PATH]))
  np.testing.assert_allclose(table[VOCAB], table[:VOCAB].mean(axis=0), atol=1e-6)
  _assert_equal(
    {path: value for path, value in loaded.items() if path != EMBEDDING_PATH},
    {path: value for path, value in before.items() if path != EMBEDDING_PATH},
  )

  exported = tmp_path / "exported"
  exported.mkdir()
  raw = grown.to_hugging_face() | {"step_marker_token_id": VOCAB}
  (exported / "config.json").write_text(json.dumps(raw))
  loaded[EMBEDDING_PATH] = loaded[EMBEDDING_PATH].at[VOCAB].add(1.0)
  weights.save(
    exported, loaded, grown, yes_token=YES, no_token=NO, base=tmp_path / "published",
    dtype="float32",
  )  # fmt: skip
  _assert_equal(weights.load(exported, grown, _shapes(grown), **kwargs), loaded)
  before_head, head = (
    next(v for k, v in _tensors(folder).items() if k.endswith(("output.weight", "lm_head.weight")))
    for folder in (tmp_path / "published", exported)
  )
  assert torch.equal(head[:VOCAB], before_head) and len(head) == VOCAB + 1

  with pytest.raises(weights.WeightsError, match=r"is \(512, 64\), the model has \(513, 64\)"):
    weights.load(tmp_path / "published", grown, _shapes(grown), **KWARGS)


def test_the_marker_row_is_the_mean_of_the_others_and_noise_where_it_is_asked_for(tmp_path):
  """The published table lacks the row; noise 0.5 is half of the others' spread, and is repeatable."""
  config = INTERNVL_SIZES["tiny"].with_vocabulary(VOCAB)
  _write(tmp_path, config, _random(config))
  text = dataclasses.replace(config.text, vocab_size=VOCAB + 1)
  grown = dataclasses.replace(config, text=text)
  kwargs = KWARGS | {"marker_token": VOCAB}
  plain, noisy, again = (
    np.asarray(
      weights.load(tmp_path, grown, _shapes(grown), **kwargs, marker_noise=n)[EMBEDDING_PATH]
    )
    for n in (0.0, 0.5, 0.5)
  )
  np.testing.assert_allclose(plain[VOCAB], plain[:VOCAB].mean(axis=0), rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(noisy[:VOCAB], plain[:VOCAB])
  np.testing.assert_array_equal(noisy, again)
  strength = (noisy[VOCAB] - plain[VOCAB]) / plain[:VOCAB].std(axis=0)
  assert 0.35 < strength.std() < 0.65 and abs(strength.mean()) < 0.25


def test_every_difference_is_listed_in_one_error(tmp_path):
  config = INTERNVL_SIZES["tiny"].with_vocabulary(VOCAB)
  _write(tmp_path, config, _random(config))
  tensors = _tensors(tmp_path)
  for file in tmp_path.glob("model*"):
    file.unlink()
  wqkv = "language_model.model.layers.1.attention.wqkv.weight"
  tensors[wqkv] = tensors[wqkv][:-1].clone()
  tensors["mlp1.2.weight"] = tensors.pop("mlp1.1.weight")
  save_file(tensors, tmp_path / "model.safetensors")
  raw = config.to_hugging_face()
  raw["llm_config"]["rope_theta"] = 1e4
  (tmp_path / "config.json").write_text(json.dumps(raw))
  with pytest.raises(weights.WeightsError) as error:
    weights.load(tmp_path, config, _shapes(config), **KWARGS)
  for line in (
    f"wrong shape: {wqkv} is (127, 64), the model has (128, 64)",
    "missing: mlp1.1.weight (64, 128)",
    "unknown: mlp1.2.weight of model.safetensors",
    "rope_theta is 10000.0, the model has 1000000.0",
    "4 problems",
  ):
    assert line in str(error.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'"),
    ({"ps_version": "v1"}, "ps_version is 'v1'"),
    ({"select_layer": -4}, "select_layer is -4"),
  ],
)
def test_another_form_of_the_model_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    InternVLConfig.from_hugging_face(
      INTERNVL_SIZES["tiny"].with_vocabulary(512).to_hugging_face() | change
    )


@pytest.mark.parametrize("layout", ["hub", "hf"])
@pytest.mark.parametrize("size", ["3-8b", "3-14b"])
def test_config_json_round_trip(size, layout):
  config = INTERNVL_SIZES[size]
  raw = config.to_hugging_face(layout)
  again = InternVLConfig.from_hugging_face(raw)
  assert (again.text, again.vision) == (config.text, config.vision)


def _count(shapes):
  return sum(int(np.prod(s.shape)) for path, s in shapes.items() if path != REWARD_HEAD_PATH)


@pytest.mark.parametrize(
  ("size", "released"),
  [("2.5-1b", 938_193_024), ("2.5-2b", 2_205_754_368), ("2.5-4b", 3_712_637_952),
   ("2.5-8b", 8_075_365_376), ("2.5-26b", 25_514_186_112), ("2.5-38b", 38_388_164_992),
   ("2.5-78b", 78_408_318_336), ("3-2b", 2_088_957_440), ("3-8b", 7_944_373_760),
   ("3-14b", 15_117_256_704)],
)  # fmt: skip
def test_parameter_counts_are_transformers_own(size, released):
  """Exact, against Transformers' modules with the release's vocabulary, whose total is named.

  Ours has the marker's row more, and two columns where theirs has the LM head.
  """
  config = INTERNVL_SIZES[size]
  raw = config.to_hugging_face("hf")
  raw["text_config"]["vocab_size"] -= 1
  if config.text.architecture == "internlm2":
    raw["text_config"]["model_type"] = "llama"
  with torch.device("meta"):
    theirs = InternVLForConditionalGeneration(TorchConfig(**raw))
  total = sum(p.numel() for p in theirs.parameters())
  row = config.text.hidden_size
  assert total == released
  assert _count(_shapes(config)) == total - theirs.lm_head.weight.numel() + row


@pytest.mark.parametrize("size", ["1b", "38b", "78b"])
def test_internvl3_has_these_sizes_of_internvl2_5(size):
  assert INTERNVL_SIZES[f"3-{size}"] == INTERNVL_SIZES[f"2.5-{size}"]
