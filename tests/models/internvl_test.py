"""InternVL against Transformers, float32 on CPU: every stage, gradients, and mutations.

The references are InternVLForConditionalGeneration with Qwen2 inside, which is InternVL3, and with
Llama inside: InternLM2.5 is Llama with other names and fused weights, and is loaded from those here.

Errors are ||ours - reference|| / ||reference||. `python -m pytest tests/models -s` prints the worst;
measured: 1.5e-6 at every stage, 1.9e-6 of gradients.

Mutations of batches are tests below. These mutations of the code were each tried once, and moved the
logits by 4.7e-5 (tanh for erf) to 1.8 where the code has 7e-7: the pixel shuffle's pairs exchanged,
or its first version; tanh for erf; the class token behind the patches; the fused weights of
InternLM2.5 cut with the key first, or as if not by key head; w1 and w3 exchanged; the tower's queries
and keys exchanged; rope by neighbours instead of halves; another rope base; a causal tower; the two
layer scales exchanged, or left out; no norm before the head; another norm epsilon in the decoder
(1.4e-5). Another epsilon in the tower moves them by 1e-6 only: there `weights` compares config.json.
"""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import InternVLConfig as TorchConfig
from transformers import InternVLForConditionalGeneration

from bis_jax.hub import weights
from bis_jax.models import param_tree
from bis_jax.models.decoder import place_features
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.internvl.model import InternVL
from tests.torch_reference import layer_output

VOCAB, YES, NO, MARKER, CONTEXT, IMAGE_START, IMAGE_END = 512, 11, 12, 505, 500, 501, 502
TOKENS, TILES, MARKERS = 96, 5, 8  # of a row: one shape, compiled once
TILE_TOKENS = 4  # of the tiny tower: 16 patches a tile


def tiny(vocab_size, architecture):
  """The tiny InternVL with one of the two published decoders."""
  config = INTERNVL_SIZES["tiny"].with_vocabulary(vocab_size)
  return dataclasses.replace(
    config, text=dataclasses.replace(config.text, architecture=architecture)
  )


@dataclasses.dataclass
class Sample:
  """One sample: ids [t], markers [m], float32[tiles, 3, 56, 56] of all its images."""

  ids: np.ndarray
  markers: np.ndarray
  tiles: np.ndarray

  def torch_inputs(self) -> dict:
    inputs = {"input_ids": torch.tensor(self.ids, dtype=torch.long)[None]}
    if len(self.tiles):
      inputs["pixel_values"] = torch.tensor(self.tiles)
    return inputs


def _draw(seed, tile_counts, words=24):
  """A random sample with an image of each number of tiles."""
  rng = np.random.default_rng(seed)
  ids = []
  for count in tile_counts:
    ids += [IMAGE_START, *[CONTEXT] * (TILE_TOKENS * count), IMAGE_END, int(rng.integers(20, 490))]
  text = rng.integers(20, 490, words)
  text[5::6] = MARKER
  ids = np.array([*ids, *text])
  tiles = rng.normal(size=(sum(tile_counts), 3, 56, 56)).astype(np.float32)
  return Sample(ids, np.flatnonzero(ids == MARKER), tiles)


def _assemble(rows):
  """Packs samples into rows by the batch layout that `InternVL.__call__` documents."""
  b = len(rows)
  batch = {
    "tokens": np.zeros((b, TOKENS), np.int32),
    "segment_ids": np.zeros((b, TOKENS), np.int32),
    "positions": np.zeros((b, TOKENS), np.int32),
    "patches": np.zeros((b, TILES * 16, 588), np.float32),
    "image_index": np.full((b, TOKENS), -1, np.int32),
    "marker_index": np.zeros((b, MARKERS), np.int32),
  }
  for row, samples in enumerate(rows):
    token = marker = tile = 0
    for segment, sample in enumerate(samples, start=1):
      here = slice(token, token + len(sample.ids))
      batch["tokens"][row, here] = sample.ids
      batch["segment_ids"][row, here] = segment
      batch["positions"][row, here] = np.arange(len(sample.ids))
      used = slice(marker, marker + len(sample.markers))
      batch["marker_index"][row, used] = token + sample.markers
      if len(sample.tiles):
        patches = torch.nn.functional.unfold(torch.tensor(sample.tiles), 14, stride=14)
        patches = patches.transpose(1, 2).reshape(-1, 588)
        batch["patches"][row, 16 * tile : 16 * tile + len(patches)] = patches.numpy()
      context = token + np.flatnonzero(sample.ids == CONTEXT)
      batch["image_index"][row, context] = tile * TILE_TOKENS + np.arange(len(context))
      token, marker, tile = here.stop, used.stop, tile + len(sample.tiles)
  return batch


def _relative_error(ours, reference):
  ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
  return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def _release_tensors(torch_model, config):
  """A reference's tensors as the release's files of InternLM2.5 or Qwen2.5 hold them.

  Written from the release's own code (`rearrange(wqkv, "(h gs d) ..")` with gs query heads, one key
  head and one value head a group) and apart from the loader's table.
  """
  named = {k: v.clone() for k, v in torch_model.state_dict().items()}
  out = {
    "vision_model.embeddings.class_embedding": named["model.vision_tower.embeddings.cls_token"]
  }
  tower, decoder = "model.vision_tower.", "model.language_model."
  out["vision_model.embeddings.position_embedding"] = named[
    tower + "embeddings.position_embeddings"
  ]
  for end in ("weight", "bias"):
    conv = named[f"{tower}embeddings.patch_embeddings.projection.{end}"]
    out[f"vision_model.embeddings.patch_embedding.{end}"] = conv
    for place, part in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
      out[f"mlp1.{place}.{end}"] = named[f"model.multi_modal_projector.{part}.{end}"]
  for i in range(config.vision.num_hidden_layers):
    old, new = f"{tower}encoder.layer.{i}.", f"vision_model.encoder.layers.{i}."
    out[new + "ls1"], out[new + "ls2"] = named[old + "lambda_1"], named[old + "lambda_2"]
    for end in ("weight", "bias"):
      qkv = [named[f"{old}attention.{part}_proj.{end}"] for part in "qkv"]
      out[f"{new}attn.qkv.{end}"] = torch.cat(qkv)
      out[f"{new}attn.proj.{end}"] = named[f"{old}attention.projection_layer.{end}"]
      out[f"{new}norm1.{end}"] = named[f"{old}layernorm_before.{end}"]
      out[f"{new}norm2.{end}"] = named[f"{old}layernorm_after.{end}"]
      for fc in ("fc1", "fc2"):
        out[f"{new}mlp.{fc}.{end}"] = named[f"{old}mlp.{fc}.{end}"]
  if config.text.architecture == "qwen2":
    for key, value in named.items():
      if key.startswith(decoder):
        out["language_model.model." + key.removeprefix(decoder)] = value
    return out | {"language_model.lm_head.weight": named["lm_head.weight"]}
  text, h = config.text, config.text.head_dim
  for i in range(text.num_hidden_layers):
    old, new = f"{decoder}layers.{i}.", f"language_model.model.layers.{i}."
    q, k, v = (named[f"{old}self_attn.{part}_proj.weight"] for part in "qkv")
    heads = [w.reshape(text.num_key_value_heads, -1, h, text.hidden_size) for w in (q, k, v)]
    out[new + "attention.wqkv.weight"] = torch.cat(heads, dim=1).reshape(-1, text.hidden_size)
    for ours, theirs in (
      ("attention.wo", "self_attn.o_proj"),
      ("feed_forward.w1", "mlp.gate_proj"),
      ("feed_forward.w2", "mlp.down_proj"),
      ("feed_forward.w3", "mlp.up_proj"),
      ("attention_norm", "input_layernorm"),
      ("ffn_norm", "post_attention_layernorm"),
    ):
      out[f"{new}{ours}.weight"] = named[f"{old}{theirs}.weight"]
  return out | {
    "language_model.model.tok_embeddings.weight": named[decoder + "embed_tokens.weight"],
    "language_model.model.norm.weight": named[decoder + "norm.weight"],
    "language_model.output.weight": named["lm_head.weight"],
  }


def _torch_model(config):
  """The reference, float32, with weights large enough that every mask and angle shows."""
  torch.manual_seed(0)
  raw = config.to_hugging_face("hf")
  if config.text.architecture == "internlm2":
    raw["text_config"]["model_type"] = "llama"
  torch_config = TorchConfig(**raw, image_token_id=CONTEXT)
  torch_config._attn_implementation = "eager"
  model = InternVLForConditionalGeneration(torch_config).eval()
  for name, parameter in model.named_parameters():
    fan_in = parameter[0].numel()
    spread = {1: 0.1}.get(parameter.ndim, 1.0 if "embed" in name else fan_in**-0.5)
    torch.nn.init.normal_(parameter, mean=float("norm" in name or "lambda" in name), std=spread)
  return model


def _shapes(config, sharding=None):
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _, shapes = param_tree.split(nnx.eval_shape(lambda: InternVL(config, nnx.Rngs(0))))
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def _load(folder, config, **kwargs):
  tokens = {"yes_token": YES, "no_token": NO, "marker_token": None}
  return weights.load(folder, config, _shapes(config), **{**tokens, **kwargs})


def _model(config, params):
  graph, _ = param_tree.split(nnx.eval_shape(lambda: InternVL(config, nnx.Rngs(0))))
  return param_tree.merge(graph, params)


_forward = jax.jit(lambda model, batch: model(batch))


@pytest.fixture(scope="module", params=["internlm2", "qwen2"])
def lab(request, tmp_path_factory):
  """A config, the reference, its weights in our parameters by the release's files, and the model."""
  config = tiny(VOCAB, request.param)
  torch_model = _torch_model(config)
  folder = tmp_path_factory.mktemp("release")
  tensors = {k: v.contiguous() for k, v in _release_tensors(torch_model, config).items()}
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(config.to_hugging_face("hub")))
  params = _load(folder, config)
  return types.SimpleNamespace(
    config=config,
    torch_model=torch_model,
    tensors=tensors,
    folder=folder,
    params=params,
    model=_model(config, params),
  )


def _layer(layers, i):
  return jax.tree.map(lambda array: array[i], layers)


_apply = jax.jit(lambda layer, *args: layer(*args))
_decoder_layer = jax.jit(layer_output)


def _stages(lab, batch):
  """The model's computation layer by layer, one named output per stage."""
  model, config, out = lab.model, lab.config, {}
  tower, decoder = model.vision_model, model.language_model
  tiles = batch["patches"].reshape(1, TILES, 16, 588)
  x = out["tile embeddings"] = tower.embed(tiles)
  for i in range(config.vision.num_hidden_layers):
    x = out[f"tower {i}"] = _apply(_layer(tower.layers, i), x)
  features = out["projector"] = model.mlp1(tower(tiles))
  x = decoder.embed_tokens(batch["tokens"])
  features = features.reshape(len(x), -1, x.shape[-1])
  x = out["embeddings"] = place_features(x, features, batch["image_index"])
  rope = model.rope(batch["positions"])
  for i in range(config.text.num_hidden_layers):
    x = _decoder_layer(_layer(decoder.layers, i), x, rope, batch["segment_ids"])
    out[f"layer {i}"] = x
  out["final states"] = decoder.norm(x)
  out["logits"] = _forward(model, batch)
  return out


def _reference_stages(torch_model, sample):
  """The same stages of Transformers."""
  out, hooks = {}, []

  def keep(name, module):
    hook = lambda module, args, output: out.update({name: output.detach().numpy()})  # noqa: E731
    hooks.append(module.register_forward_hook(hook))

  model = torch_model.model
  keep("tile embeddings", model.vision_tower.embeddings)
  for i, layer in enumerate(model.vision_tower.encoder.layer):
    keep(f"tower {i}", layer)
  keep("projector", model.multi_modal_projector)
  for i, layer in enumerate(model.language_model.layers):
    keep(f"layer {i}", layer)
  keep("final states", model.language_model.norm)
  hooks.append(
    model.language_model.register_forward_pre_hook(
      lambda module, args, kwargs: out.update(embeddings=kwargs["inputs_embeds"].numpy()),
      with_kwargs=True,
    )
  )
  with torch.no_grad():
    logits = torch_model(**sample.torch_inputs()).logits[0]
  for hook in hooks:
    hook.remove()
  out["logits"] = logits[sample.markers][:, [YES, NO]].numpy()
  return out


@pytest.mark.parametrize("tile_counts", [(1,), (4,), (3, 2), ()], ids=str)
def test_every_stage_equals_transformers(lab, tile_counts):
  """At most 1e-5 at every stage, for 0 to 2 images of one or more tiles."""
  sample = _draw(len(tile_counts), tile_counts)
  ours, errors = _stages(lab, _assemble([[sample]])), {}
  for name, value in _reference_stages(lab.torch_model, sample).items():
    length = len(sample.markers) if name == "logits" else len(sample.ids)
    if name.startswith(("tile", "tower", "projector")):
      length = len(sample.tiles)
    row = np.asarray(ours.pop(name))[0][:length]
    errors[name] = _relative_error(row, value.reshape(row.shape))
  assert not ours or not len(sample.tiles) and all("t" in name for name in ours)
  print(f"\n{lab.config.text.architecture} {tile_counts}: worst {max(errors.values()):.1e}")
  assert max(errors.values()) < 1e-5, errors


def test_the_tower_of_internvit_6b(tmp_path):
  """RMSNorm, queries and keys normed and without bias; in Transformers' layout and the release's."""
  config = tiny(VOCAB, "qwen2")
  own = {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}
  config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **own))
  torch_model = _torch_model(config)
  torch_model.save_pretrained(tmp_path)
  params = _load(tmp_path, config)
  sample = _draw(1, (3, 2))
  ours = _stages(types.SimpleNamespace(config=config, model=_model(config, params)),
                 _assemble([[sample]]))  # fmt: skip
  for name, value in _reference_stages(torch_model, sample).items():
    length = len(sample.ids) if name.startswith(("emb", "layer", "final")) else len(value)
    row = np.asarray(ours[name])[0][:length]
    assert _relative_error(row, value.reshape(row.shape)) < 1e-5, name
  release = tmp_path / "release"
  release.mkdir()
  (release / "config.json").write_text(json.dumps(config.to_hugging_face("hub")))
  tokens = {"yes_token": YES, "no_token": NO}
  weights.save(release, params, config, **tokens, base=None, dtype="float32")
  again = _load(release, config)
  for path, value in params.items():
    np.testing.assert_array_equal(np.asarray(again[path]), np.asarray(value), err_msg=path)
  [file] = release.glob("*.safetensors")
  with safe_open(file, "np") as opened:
    keys = {key.removeprefix("vision_model.encoder.layers.0.attn.") for key in opened.keys()}  # noqa: SIM118
  assert {"qkv.weight", "q_norm.weight", "k_norm.weight"} <= keys and "qkv.bias" not in keys


def test_gradients_of_the_reward_loss(lab):
  """At most 1e-4 for every tensor of the reference, in its own layout."""
  sample = _draw(9, (2, 1))
  targets = np.array([1.0, 0.0, 1.0, 0.25], np.float32)[: len(sample.markers)]

  def loss(model, batch):
    log_probs = jax.nn.log_softmax(model(batch)[0, : len(targets)])
    return -(targets * log_probs[:, 0] + (1 - targets) * log_probs[:, 1]).mean()

  batch = _assemble([[sample]])
  _, ours = param_tree.split(jax.jit(jax.grad(loss))(lab.model, batch))
  remat = _model(dataclasses.replace(lab.config, remat="full"), lab.params)
  _, again = param_tree.split(jax.jit(jax.grad(loss))(remat, batch))
  zero = "vision_model.layers.attn.k_proj.bias"  # softmax does not see it; both have rounding alone
  assert max(_relative_error(again[path], ours[path]) for path in ours if path != zero) < 1e-5
  assert np.abs(ours[zero]).max() < 1e-4 * np.abs(ours[zero.replace("k_proj", "q_proj")]).max()

  reference = lab.torch_model
  reference.zero_grad()
  logits = reference(**sample.torch_inputs()).logits[0, sample.markers][:, [YES, NO]]
  columns = torch.tensor(np.stack([targets, 1 - targets], axis=1))
  torch.nn.functional.cross_entropy(logits, columns).backward()
  theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}
  head = _relative_error(ours["reward_head.kernel"], theirs["lm_head.weight"][[YES, NO]].T)
  errors = {"reward_head.kernel": head}
  for path, value in ours.items():
    if path not in ("reward_head.kernel", zero):
      errors[path] = _relative_error(value, _reference_gradient(path, value.shape, theirs))
  print("\ngradients: worst", f"{max(errors.values()):.1e}")
  assert max(errors.values()) < 1e-4, errors


_TORCH_NAMES = (
  ("vision_model.class_embedding", "vision_tower.embeddings.cls_token"),
  ("vision_model.position_embedding", "vision_tower.embeddings.position_embeddings"),
  ("vision_model.patch_embedding", "vision_tower.embeddings.patch_embeddings.projection"),
  ("vision_model.layers", "vision_tower.encoder.layers"),
  (".self_attn.", ".self-attn."),
  ("attn.proj.", "attention.projection_layer."),
  (".attn.", ".attention."),
  (".self-attn.", ".self_attn."),
  (".norm1.", ".layernorm_before."),
  (".norm2.", ".layernorm_after."),
  (".ls", ".lambda_"),
  ("mlp1.norm", "multi_modal_projector.layer_norm"),
  ("mlp1.fc", "multi_modal_projector.linear_"),
)


def _reference_gradient(path, shape, theirs):
  """Transformers' gradient in our layout; written apart from the loader's table."""
  name = "model." + path
  for ours, torch_name in _TORCH_NAMES:
    name = name.replace(ours, torch_name)
  for end in (".kernel", ".scale", ".embedding"):
    name = name.removesuffix(end) + (".weight" if name.endswith(end) else "")
  if ".layers." in name:
    numbered = [name.replace(".layers.", f".layers.{i}.") for i in range(shape[0])]
    numbered = [n.replace("encoder.layers", "encoder.layer") for n in numbered]
    value = np.stack([theirs[n] for n in numbered])
  else:
    value = theirs[name]
  if path == "vision_model.patch_embedding.kernel":
    return value.reshape(len(value), -1).T
  return (value.swapaxes(-1, -2) if path.endswith(".kernel") else value).reshape(shape)


def test_packed_rows_equal_each_sample_alone(lab):
  samples = [_draw(5, (2,), 18), _draw(6, (), 12), _draw(7, (1, 1), 12)]
  together = _forward(lab.model, _assemble([samples]))[0]
  start = 0
  for sample in samples:
    alone = _forward(lab.model, _assemble([[sample]]))[0, : len(sample.markers)]
    assert _relative_error(together[start : start + len(alone)], alone) < 1e-5
    start += len(alone)


def test_a_wrong_mask_order_or_position_shows(lab):
  """Each mutation of a batch moves the logits by at least a hundred times the allowed error."""
  batch = _assemble([[_draw(3, (2, 1), 18), _draw(4, (), 12)]])
  right, index = _forward(lab.model, batch), batch["image_index"]
  tiles = batch["patches"].reshape(1, TILES, 4, 4, 588)
  mutations = {
    "samples mixed": {"segment_ids": np.minimum(batch["segment_ids"], 1)},
    "tiles exchanged": {"patches": tiles[:, [1, 0, 2, 3, 4]].reshape(1, -1, 588)},
    "patches transposed": {"patches": tiles.swapaxes(2, 3).reshape(1, -1, 588)},
    "features one off": {"image_index": np.where(index > 0, index - 1, index)},
    "positions stand still": {"positions": batch["positions"] // 2},
  }
  for name, mutation in mutations.items():
    assert _relative_error(_forward(lab.model, {**batch, **mutation}), right) > 1e-3, name


def test_drop_path_acts_on_whole_tiles_and_only_with_a_key(lab):
  """Off without a key; with one, the mean over keys is the tower's own output, tile by tile."""
  dropping = _model(dataclasses.replace(lab.config, drop_path=0.5), lab.params).vision_model
  tiles = jnp.asarray(_assemble([[_draw(1, (2,))]])["patches"]).reshape(1, TILES, 16, 588)
  plain = lab.model.vision_model(tiles)
  assert jnp.array_equal(dropping(tiles), plain)
  x = dropping.embed(tiles)
  layer = _layer(dropping.layers, 0)
  kept = jnp.ones((1, TILES, 2)).at[0, 1].set(0.0)
  out = layer(x, kept)
  assert jnp.array_equal(out[0, 1], x[0, 1]) and jnp.array_equal(out[0, 0], layer(x)[0, 0])
  keys = jax.random.split(jax.random.key(0), 2)
  a, b = (jax.jit(lambda t, k: dropping(t, k))(tiles, key) for key in keys)
  assert _relative_error(a, plain) > 0.01 and _relative_error(a, b) > 0.01
