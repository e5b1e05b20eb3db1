"""Weights in: layouts, strictness, sharded reading, and exact parameter counts."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig as TorchConfig
from transformers import Qwen2_5_VLForConditionalGeneration

from bis_jax.hub import weights
from bis_jax.models.hub_layout import REWARD_HEAD_PATH
from bis_jax.models.qwen2_5_vl.config import SIZES as QWEN_SIZES
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from bis_jax.models.qwen2_5_vl.hub_layout import layout
from tests.xla_flags import FAST_COMPILATION


@pytest.fixture
def tensors(torch_model) -> dict[str, torch.Tensor]:
  """The reference's tensors under the keys that the hub uses."""
  renamed = {}
  for key, value in torch_model.state_dict().items():
    key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    renamed[key] = value.clone()
  return renamed


def _load(lab, folder, config, sharding=None, **kwargs):
  tokens = {"yes_token": lab.yes, "no_token": lab.no, "marker_token": None}
  return weights.load(folder, config, lab.shapes(config, sharding), **{**tokens, **kwargs})


def _save(tensors, config, path):
  save_file(tensors, path / "model.safetensors")
  (path / "config.json").write_text(json.dumps(config.to_hugging_face()))


def _assert_equal(a, b):
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.mark.parametrize(
  ("size", "reference"),
  [
    (
      QWEN_SIZES["3b"],
      dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, vocab_size=151936,
           num_attention_heads=16, num_key_value_heads=2),
    ),
    (
      QWEN_SIZES["7b"],
      dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064,
           num_attention_heads=28, num_key_value_heads=4),
    ),
    (
      QWEN_SIZES["32b"],
      dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, vocab_size=152064,
           num_attention_heads=40, num_key_value_heads=8),
    ),
    (
      QWEN_SIZES["72b"],
      dict(hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, vocab_size=152064,
           num_attention_heads=64, num_key_value_heads=8),
    ),
  ],
  ids=["3b", "7b", "32b", "72b"],
)  # fmt: skip
def test_parameter_counts_are_transformers_own(lab, size, reference):
  """Exact; ours has two columns where theirs has the LM head (none of its own if tied)."""
  tied = size.tie_word_embeddings
  rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
  torch_config = TorchConfig(
    text_config={**reference, "rope_parameters": rope, "rms_norm_eps": 1e-6},
    vision_config={
      "hidden_size": 1280,
      "out_hidden_size": reference["hidden_size"],
      "intermediate_size": 3420 if reference["hidden_size"] < 5000 else 3456,
    },
    tie_word_embeddings=tied,
  )
  with torch.device("meta"):
    theirs = Qwen2_5_VLForConditionalGeneration(torch_config)
  head = 0 if tied else theirs.lm_head.weight.numel()
  expected = sum(p.numel() for p in theirs.parameters()) - head
  ours = {path: s for path, s in lab.shapes(size).items() if path != REWARD_HEAD_PATH}
  assert sum(int(np.prod(s.shape)) for s in ours.values()) == expected
  names = layout(size, {})
  keys = {key for t in names.tensors(ours).values() for key in t.keys}
  assert keys == {names.canonical(key) for key in theirs.state_dict()} - {names.lm_head}
  assert Qwen2_5_VLConfig.from_hugging_face(torch_config.to_dict()) == dataclasses.replace(
    size, dtype="float32"
  )


def test_both_key_layouts_give_the_same_parameters(lab, config, params, torch_model, tmp_path):
  """Sharded hub files (the `params` fixture) against one file of newer Transformers' keys."""
  _save({key: value.clone() for key, value in torch_model.state_dict().items()}, config, tmp_path)
  with safe_open(tmp_path / "model.safetensors", "np") as opened:
    assert "model.language_model.norm.weight" in opened.keys()  # noqa: SIM118
  _assert_equal(_load(lab, tmp_path, config), params)


def test_the_head_is_the_yes_and_no_rows(lab, config, params, tensors):
  rows = tensors["lm_head.weight"][[lab.yes, lab.no]].numpy()
  np.testing.assert_array_equal(np.asarray(params[REWARD_HEAD_PATH]), rows.T)


def test_a_tied_head_comes_from_the_embedding(lab, config, tensors, tmp_path):
  del tensors["lm_head.weight"]
  _save(tensors, config, tmp_path)
  tied = _load(lab, tmp_path, dataclasses.replace(config, tie_word_embeddings=True))
  rows = tensors["model.embed_tokens.weight"][[lab.yes, lab.no]].numpy()
  np.testing.assert_array_equal(np.asarray(tied[REWARD_HEAD_PATH]), rows.T)
  with pytest.raises(weights.WeightsError, match="missing: lm_head.weight"):
    _load(lab, tmp_path, config)


def test_the_marker_row_becomes_the_mean_of_the_rows_before_it(lab, config, params, folder):
  path = "language_model.embed_tokens.embedding"
  before = np.asarray(params[path])
  after = np.asarray(_load(lab, folder, config, marker_token=lab.marker)[path])
  np.testing.assert_allclose(after[lab.marker], before[: lab.marker].mean(axis=0), atol=1e-6)
  others = np.arange(len(before)) != lab.marker
  np.testing.assert_array_equal(after[others], before[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_exactly(lab, config, tensors, tmp_path, dtype):
  halves = {key: value.to(dtype) for key, value in tensors.items()}
  _save(halves, config, tmp_path)
  loaded = _load(lab, tmp_path, config)
  expected = halves["model.layers.1.mlp.down_proj.weight"].float().numpy().T
  ours = np.asarray(loaded["language_model.layers.mlp.down_proj.kernel"][1])
  np.testing.assert_array_equal(ours, expected)


def _copied(folder, bucket):
  for file in folder.iterdir():
    (bucket / file.name).write_bytes(file.read_bytes())
  return bucket


def _sharded(lab, config, spec):
  """Shapes on 4 x 2 devices."""
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
  shapes = {}
  for path, shape in lab.shapes(config).items():
    axes = [
      axis if axis and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(spec, shape.shape, strict=False)
    ]
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    shapes[path] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
  return shapes


@pytest.mark.parametrize(
  "spec", [PartitionSpec(), PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor")]
)
def test_shards_hold_what_one_device_would(lab, config, params, folder, spec):
  """Each device's shard is read from the file on its own."""
  shapes = _sharded(lab, config, spec)
  loaded = weights.load(
    folder, config, shapes, yes_token=lab.yes, no_token=lab.no, marker_token=None
  )
  _assert_equal(loaded, params)
  assert all(loaded[path].sharding == shapes[path].sharding for path in loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_a_bucket_is_read_once_in_ranges(
  lab, config, tensors, tmp_path, bucket, bucket_server, dtype
):
  """Whatever the sharding: by itself a device would read the columns of others too."""
  _save({key: value.to(dtype) for key, value in tensors.items()}, config, tmp_path)
  place = _copied(tmp_path, bucket)
  size = (tmp_path / "model.safetensors").stat().st_size
  shapes = _sharded(lab, config, PartitionSpec(None, "fsdp", "tensor"))
  tokens = {"yes_token": lab.yes, "no_token": lab.no, "marker_token": None}

  def bytes_read(read):
    before = len(bucket_server.log)
    read()
    log = bucket_server.log[before:]
    return sum(size for _, name, size in log if name.endswith("safetensors"))

  assert bytes_read(lambda: weights.check(place, config, shapes, lab.marker)) < 0.2 * size
  loaded = {}
  assert bytes_read(lambda: loaded.update(weights.load(place, config, shapes, **tokens))) <= size
  _assert_equal(loaded, weights.load(tmp_path, config, shapes, **tokens))
  assert all(loaded[path].sharding == shapes[path].sharding for path in loaded)


def test_overridden_parameters_are_not_read(lab, config, params, tensors, tmp_path):
  del tensors["lm_head.weight"]
  _save(tensors, config, tmp_path)
  head = jax.numpy.ones((config.text.hidden_size, 2))
  loaded = _load(lab, tmp_path, config, overrides={REWARD_HEAD_PATH: head})
  _assert_equal(loaded, {**params, REWARD_HEAD_PATH: head})


def test_every_difference_is_listed_in_one_error(lab, config, tensors, tmp_path):
  gone = tensors.pop("model.layers.0.mlp.gate_proj.weight")
  tensors["model.layers.7.mlp.gate_proj.weight"] = gone
  tensors["visual.merger.ln_q.weight"] = torch.zeros(3)
  tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
  tensors["model.language_model.layers.1.mlp.up_proj.weight"] = tensors[
    "model.layers.1.mlp.up_proj.weight"
  ].clone()
  _save(tensors, config, tmp_path)
  with pytest.raises(weights.WeightsError) as error:
    _load(lab, tmp_path, config)
  for line in (
    "missing: model.layers.0.mlp.gate_proj.weight (96, 64)",
    "unknown: model.layers.7.mlp.gate_proj.weight of model.safetensors",
    "wrong shape: visual.merger.ln_q.weight is (3,), the model has (32,)",
    "wrong dtype: model.norm.weight is I32",
    "duplicate: model.layers.1.mlp.up_proj.weight (model.",
    "5 problems",
  ):
    assert line in str(error.value)
  unknown = {"model.layers.7.mlp.gate_proj.weight"}
  with pytest.raises(weights.WeightsError, match="4 problems"):
    _load(lab, tmp_path, config, skip=[re.escape(key) for key in unknown])


def test_damaged_files_are_named(lab, config, folder, tmp_path, bucket):
  """A file cut short, a file of garbage, and a missing file that the index names."""
  for file in folder.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  cut, garbage, gone = names[:3]
  (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:-7])
  (tmp_path / garbage).write_bytes(b"not safetensors at all")
  (tmp_path / gone).unlink()
  with pytest.raises(weights.WeightsError) as error:
    _load(lab, tmp_path, config)
  assert f"truncated or corrupt file: {cut}" in str(error.value)
  assert f"truncated or corrupt file: {garbage}" in str(error.value)
  assert f"missing file: {gone}" in str(error.value)
  with pytest.raises(weights.WeightsError) as in_bucket:
    _load(lab, _copied(tmp_path, bucket), config)
  for name in (cut, garbage):
    assert f"truncated or corrupt file: {name}" in str(in_bucket.value)
  assert f"missing file: {gone}" in str(in_bucket.value)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", 3])
def test_an_index_names_no_file_outside_its_folder(lab, config, tensors, tmp_path, name):
  """Mutation caught: a shared folder's index reads any safetensors file of the machine."""
  (tmp_path / "in").mkdir()
  _save(tensors, config, tmp_path / "in")
  _save(tensors, config, tmp_path)
  name = str(tmp_path / name[1:]) if name == "/model.safetensors" else name
  index = {"weight_map": dict.fromkeys(tensors, name)}
  (tmp_path / "in/model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(weights.WeightsError, match="which is not in the folder"):
    _load(lab, tmp_path / "in", config)


def test_another_architecture_is_refused(lab, config, folder, tmp_path):
  """Differences that shapes do not show: rope base, sections, heads of the same total width."""
  other = dataclasses.replace(config.text, rope_theta=1e4, mrope_section=(3, 3, 2))
  with pytest.raises(weights.WeightsError, match=r"rope_theta is 1000000.0, the model has 10000"):
    _load(lab, folder, dataclasses.replace(config, text=other))


def test_pickles_are_not_read(lab, config, tensors, tmp_path):
  torch.save(tensors, tmp_path / "pytorch_model.bin")
  with pytest.raises(weights.WeightsError, match="only safetensors are read"):
    _load(lab, tmp_path, config)


def test_a_checkpoint_is_found_by_folder_or_hub_id(folder, tmp_path, monkeypatch):
  """Offline and without a copy, the error names the command to run elsewhere."""
  assert weights.find_checkpoint(str(folder)) == folder
  with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
    weights.find_checkpoint(str(tmp_path / "nowhere"))
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(FileNotFoundError, match="hf download Qwen/Qwen2.5-VL-7B-Instruct"):
    weights.find_checkpoint("Qwen/Qwen2.5-VL-7B-Instruct")


def test_a_name_in_a_folder_that_exists_is_not_asked_of_the_hub(tmp_path, monkeypatch):
  """Mutation caught: a mistyped workdir waits for the network, and its name is sent there."""
  (tmp_path / "runs").mkdir()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

  def connect(*_, **__):
    raise AssertionError("the network was asked")

  monkeypatch.setattr(socket.socket, "connect", connect)
  monkeypatch.setattr(socket, "getaddrinfo", connect)
  with pytest.raises(FileNotFoundError, match="no folder runs/toy_bis01 .* hub was not asked"):
    weights.find_checkpoint("runs/toy_bis01")


def test_config_json_round_trip(config, folder):
  raw = json.loads((folder / "config.json").read_text())
  assert Qwen2_5_VLConfig.from_hugging_face(raw) == config
  assert Qwen2_5_VLConfig.from_hugging_face(config.to_hugging_face()) == config


_PROCESS = """
import pathlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from etils import epath
from flax import nnx
from bis_jax.hub import weights
from bis_jax.models import param_tree
from bis_jax.models.qwen2_5_vl.config import SIZES
from bis_jax.models.qwen2_5_vl.model import Qwen2_5_VL

folder, bucket, address, process = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
mesh = jax.make_mesh((4,), ("fsdp",))
config = SIZES["tiny"].with_vocabulary(512)
_, shapes = param_tree.split(nnx.eval_shape(lambda: Qwen2_5_VL(config, nnx.Rngs(0))))
split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
shapes = {p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=split)
          for p, s in shapes.items() if p.endswith("kernel") and len(s.shape) == 3}
blocks = []
read = weights.read_parameter
def counted(tensor, stored, out, block):
  blocks.append(out.size)
  read(tensor, stored, out, block)
weights.read_parameter = counted
options = dict(yes_token=11, no_token=12, marker_token=None, skip=[".*"])  # the model is a part
params = weights.load(pathlib.Path(folder), config, shapes, **options)
sums = [float(jax.jit(lambda x: (x * x).sum())(value)) for value in params.values()]
total = sum(np.prod(s.shape) for s in shapes.values())
print("RESULT", sum(blocks) / total, *sums)
for path, value in weights.load(epath.Path(bucket), config, shapes, **options).items():
  assert value.sharding == params[path].sharding
  for ours, theirs in zip(value.addressable_shards, params[path].addressable_shards):
    np.testing.assert_array_equal(np.asarray(ours.data), np.asarray(theirs.data))
"""


def test_each_of_two_processes_reads_its_half(folder, config, params, bucket, bucket_server):
  """Two processes of two devices each: every one reads half of the values, together all.

  So it is from a bucket, and there no byte is read twice.
  """
  _copied(folder, bucket)
  before = len(bucket_server.log)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {FAST_COMPILATION}"
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _PROCESS, str(folder), str(bucket), address, str(process)],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  ranges = [size for _, name, size in bucket_server.log[before:] if name.endswith("safetensors")]
  stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
  headers = 2 * 60_000  # a request for metadata counts too
  assert 0.3 * stored < sum(ranges) < stored + headers, (sum(ranges), stored)
  results = [line.split()[1:] for out in outputs for line in out.splitlines() if "RESULT" in line]
  shares, *sums = np.array(results, float).T
  np.testing.assert_allclose(shares, 0.5)
  expected = [
    float((np.asarray(value) ** 2).sum())
    for path, value in params.items()
    if path.endswith("kernel") and value.ndim == 3
  ]
  np.testing.assert_allclose(sums, np.stack([expected] * 2, axis=1), rtol=1e-5)
