"""Qwen2.5-VL against Transformers, float32 on CPU: every stage, packed rows, gradients.

Errors are ||ours - reference|| / ||reference||. `python -m pytest tests/models -s` prints the worst.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from bis_jax.models.qwen2_5_vl import text, vision
from bis_jax.models.qwen2_5_vl.model import place_features
from bis_jax.models.reward_head import at_markers

T, P, R = 640, 3072, 8  # one batch shape, so that everything compiles once
SQUARES = [((side, side),) for side in (224, 280, 336, 364, 392, 448, 504, 560, 672)]
OTHERS = [
  ((252, 616),),
  ((644, 140),),
  ((28, 28),),
  ((280, 392), (364, 224)),
  ((224, 336), (560, 364), (308, 84)),
  (),
]


def _id(sizes) -> str:
  return "+".join(f"{h}x{w}" for h, w in sizes) or "text"


@jax.jit
def _stages(model, batch):
  """The model's computation, one named output a stage, layers unrolled."""
  tower, decoder, out = model.visual, model.language_model, {}
  config = model.config
  rope = vision._rope(batch["patch_position"], config.vision.head_dim, config.vision.rope_theta)
  x = out["patch_embed"] = tower.patch_embed(batch["patches"])
  for i in range(config.vision.depth):
    block = jax.tree.map(lambda array, i=i: array[i], tower.blocks)
    full = i in config.vision.fullatt_block_indexes
    x = block(x, rope, batch["patch_window"], batch["patch_segment"], full)
    out[f"block {i} {'full' if full else 'windowed'}"] = x
  features = out["merger"] = tower.merger(x)
  x = decoder.embed_tokens(batch["tokens"])
  x = out["embeddings"] = place_features(x, features, batch["image_index"])
  rope = text._rope(
    batch["positions"], config.text.head_dim, config.text.rope_theta, config.text.mrope_section
  )
  for i in range(config.text.num_hidden_layers):
    layer = jax.tree.map(lambda array, i=i: array[i], decoder.layers)
    x = out[f"layer {i}"] = layer(x, rope, batch["segment_ids"])
  out["final states"] = decoder.norm(x)
  out["logits"] = model(batch)
  return out


def _reference_stages(torch_model, sample, lab) -> dict[str, np.ndarray]:
  """The same stages of Transformers, [tokens or patches, width] each, in its own order."""
  out, hooks = {}, []

  def keep(name, module, pick=lambda value: value):
    def hook(module, args, kwargs, output):
      out[name] = pick(output).detach().numpy()

    hooks.append(module.register_forward_hook(hook, with_kwargs=True))

  tower, decoder = torch_model.model.visual, torch_model.model.language_model
  keep("patch_embed", tower.patch_embed)
  for i, block in enumerate(tower.blocks):
    full = i in torch_model.config.vision_config.fullatt_block_indexes
    keep(f"block {i} {'full' if full else 'windowed'}", block)
  keep("merger", tower.merger)
  hooks.append(
    decoder.register_forward_pre_hook(
      lambda module, args, kwargs: out.update(embeddings=kwargs["inputs_embeds"][0].numpy()),
      with_kwargs=True,
    )
  )
  for i, layer in enumerate(decoder.layers):
    keep(f"layer {i}", layer, lambda output: output[0])
  keep("final states", decoder.norm, lambda output: output[0])
  with torch.no_grad():
    logits = torch_model(**sample.torch_inputs()).logits[0]
  for hook in hooks:
    hook.remove()
  out["logits"] = logits[sample.markers][:, [lab.yes, lab.no]].numpy()
  return out


def _in_reference_order(lab, sample, ours: dict[str, jax.Array]) -> dict[str, np.ndarray]:
  """Our stages of a row that holds one sample, without padding and in Transformers' order."""
  rows = {name: np.asarray(value[0]) for name, value in ours.items()}
  if len(sample.grids):
    slots, _, order = lab.layout(sample.grids)
    unpermuted = np.empty_like(slots)
    unpermuted[order] = slots
  out = {}
  for name, value in rows.items():
    if name == "logits":
      out[name] = value[: len(sample.markers)]
    elif name.startswith(("embeddings", "layer", "final")):
      out[name] = value[: len(sample.ids)]
    elif len(sample.grids):
      places = {"patch_embed": lambda: unpermuted, "merger": lambda: slots[::4] // 4}
      out[name] = value[places.get(name, lambda: slots)()]
  return out


@pytest.mark.parametrize("sizes", SQUARES + OTHERS, ids=_id)
def test_every_stage_equals_transformers(lab, model, torch_model, sizes):
  """At most 1e-5 at every stage, for every size of the issue's list and 0 to 3 images.

  Catches a window mask that is too wide, an image mask that mixes images, a patch rope with rows
  and columns exchanged, and a wrong order of merge units (see the mutations below).
  """
  sample = lab.draw(len(sizes), sizes)
  ours = _stages(model, lab.assemble(torch_model, [[sample]], T, P, R))
  ours = _in_reference_order(lab, sample, ours)
  reference = _reference_stages(torch_model, sample, lab)
  assert ours.keys() == reference.keys()
  errors = {name: lab.relative_error(ours[name], value) for name, value in reference.items()}
  print(f"\n{_id(sizes)}: worst {max(errors.values()):.1e}")
  assert max(errors.values()) < 1e-5, errors


def _shift_window(batch):
  """Every windowed query also sees the other windows of its 64-slot block."""
  return {**batch, "patch_window": np.minimum(batch["patch_window"], 1)}


def _mix_images(batch):
  """Full-attention blocks let images see each other."""
  return {**batch, "patch_segment": np.minimum(batch["patch_segment"], 1)}


def _see_padding(batch):
  """Empty patch slots count as part of the first image."""
  return {**batch, "patch_segment": np.maximum(batch["patch_segment"], 1)}


def _mix_samples(batch):
  """Samples of a row see what stands before them in the row."""
  return {**batch, "segment_ids": np.minimum(batch["segment_ids"], 1)}


def _window_order(batch):
  """Image tokens read the merged features in window order, without the inverse permutation."""
  index = batch["image_index"].copy()
  index[index >= 0] = np.sort(index[index >= 0])
  return {**batch, "image_index": index}


def _inverse_for_permutation(batch):
  """The permutation of the windows where its inverse belongs (hidden at 448 x 448 px)."""
  index = batch["image_index"][0].copy()
  used = np.flatnonzero(index >= 0)[: 20 * 14 // 2 // 2 * 2]
  order = np.argsort(index[used])
  values = np.sort(index[used])
  index[used] = values[order]
  return {**batch, "image_index": index[None]}


def _exchange_axes(batch):
  """Rows and columns of patches exchanged in the vision rope."""
  return {**batch, "patch_position": batch["patch_position"][..., ::-1]}


def _drop_mrope(batch):
  """Image tokens count up like text."""
  return {**batch, "positions": np.repeat(batch["positions"][:, :1], 3, axis=1)}


MUTATIONS = (
  _shift_window,
  _mix_images,
  _see_padding,
  _mix_samples,
  _window_order,
  _inverse_for_permutation,
  _exchange_axes,
  _drop_mrope,
)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__.strip("_"))
def test_a_wrong_mask_order_or_position_shows(lab, model, torch_model, mutate):
  """Each mutation of the batch moves the logits by at least a thousand times the allowed error."""
  samples = [lab.draw(3, ((280, 392), (364, 224))), lab.draw(4, ())]
  batch = lab.assemble(torch_model, [samples], T, P, R)
  right = _stages(model, batch)["logits"]
  wrong = _stages(model, mutate(batch))["logits"]
  assert lab.relative_error(wrong, right) > 1e-2


def test_a_wrong_rope_section_shows(lab, config, params, model, torch_model):
  """Sections (3, 3, 2) for (2, 3, 3): same sum, same parameters, other angles."""
  batch = lab.assemble(torch_model, [[lab.draw(3, ((280, 392),))]], T, P, R)
  right = _stages(model, batch)["logits"]
  section = dataclasses.replace(config.text, mrope_section=(3, 3, 2))
  mutated = lab.model(dataclasses.replace(config, text=section), params)
  assert lab.relative_error(_stages(mutated, batch)["logits"], right) > 1e-2


# Packed rows.


@functools.partial(jax.jit, static_argnums=())
def _forward(model, batch):
  return model(batch)


@pytest.fixture(scope="module")
def packed(lab, torch_model):
  """Three samples: with two images, with none, with one; and the row that packs them."""
  samples = [lab.draw(5, ((252, 308), (140, 140))), lab.draw(6, ()), lab.draw(7, ((364, 224),))]
  for i, sample in enumerate(samples):
    sample.markers = sample.markers[: 3 - i]  # of unequal number
  return samples, lab.assemble(torch_model, [samples], T, P, R)


def test_packed_rows_equal_each_sample_alone(lab, model, torch_model, packed):
  samples, batch = packed
  together = _forward(model, batch)[0]
  start = 0
  for sample in samples:
    alone = _forward(model, lab.assemble(torch_model, [[sample]], T, P, R))[0]
    n = len(sample.markers)
    assert lab.relative_error(together[start : start + n], alone[:n]) < 1e-5
    start += n


def test_left_out_images_and_padding_change_nothing(lab, model, torch_model, packed):
  """An image that no token reads, and other values in every empty slot, leave the logits alone."""
  samples, batch = packed
  left_out = lab.draw(8, ((224, 336),))
  left_out.ids, left_out.markers = left_out.ids[:0], left_out.markers[:0]
  with_image = dict(batch)
  for key in ("patches", "patch_position", "patch_window", "patch_segment"):
    extra = lab.assemble(torch_model, [[lab.draw(8, ((224, 336),))]], T, P, R)[key]
    offset = {"patch_window": 1000, "patch_segment": 1000}.get(key, 0)
    with_image[key] = batch[key].copy()
    with_image[key][:, -384:] = extra[:, :384] + np.asarray(offset, extra.dtype)
  padding = batch["segment_ids"] == 0
  with_image["tokens"] = np.where(padding, 77, batch["tokens"])
  with_image["positions"] = np.where(padding[:, None], 9, batch["positions"])
  n = sum(len(sample.markers) for sample in samples)
  ours, plain = _forward(model, with_image)[0, :n], _forward(model, batch)[0, :n]
  assert lab.relative_error(ours, plain) < 1e-6


def test_no_gradient_crosses_samples(model, packed):
  """The logits of each sample have gradient exactly 0 by the inputs of the others and of padding."""
  samples, batch = packed
  counts = [len(sample.markers) for sample in samples]
  owner_of_marker = np.repeat(np.arange(1, len(samples) + 1), counts)
  image_owner = np.array([0, 1, 1, 3])[batch["patch_segment"][0]]

  def logits(patches, embeddings):
    features = model.visual(
      patches, batch["patch_position"], batch["patch_window"], batch["patch_segment"]
    )
    x = place_features(embeddings, features, batch["image_index"])
    x = model.language_model(x, batch["positions"], batch["segment_ids"])
    x = at_markers(x, batch["marker_index"])
    return model.reward_head(model.language_model.norm(x))[0, :, 0]

  embeddings = model.language_model.embed_tokens(batch["tokens"])
  _, pull = jax.vjp(logits, batch["patches"], embeddings)
  pull = jax.jit(pull)
  for segment in range(1, len(samples) + 1):
    weight = np.zeros(R, np.float32)
    weight[: len(owner_of_marker)] = owner_of_marker == segment
    by_patch, by_token = (np.abs(np.asarray(g[0])).sum(axis=-1) for g in pull(weight))
    assert by_token[batch["segment_ids"][0] == segment].max() > 0
    assert by_token[batch["segment_ids"][0] != segment].max() == 0
    assert by_patch[image_owner != segment].max() == 0
    if segment in image_owner:
      assert (by_patch[image_owner == segment] > 0).all()


# Gradients, precision, remat.


def _loss(model, batch, targets):
  log_probs = jax.nn.log_softmax(model(batch)[0, : len(targets)])
  return -(targets * log_probs[:, 0] + (1 - targets) * log_probs[:, 1]).mean()


@pytest.fixture(scope="module")
def loss_case(lab, torch_model):
  sample = lab.draw(9, ((252, 308), (140, 196)))
  targets = np.array([1.0, 0.0, 1.0, 0.25], np.float32)[: len(sample.markers)]
  return sample, targets, lab.assemble(torch_model, [[sample]], T, P, R)


def test_gradients_of_the_reward_loss(lab, model, torch_model, loss_case):
  """At most 1e-4 for every parameter: all of the tower, merger, layers, head and the <prm> row."""
  sample, targets, batch = loss_case
  torch_model.zero_grad()
  logits = torch_model(**sample.torch_inputs()).logits[0, sample.markers][:, [lab.yes, lab.no]]
  columns = torch.tensor(np.stack([targets, 1 - targets], axis=1))
  torch.nn.functional.cross_entropy(logits, columns).backward()
  ours = jax.jit(jax.grad(_loss))(model, batch, targets)

  from bis_jax import state

  _, ours = state.split(ours)
  theirs = {name: p.grad.numpy() for name, p in torch_model.named_parameters()}
  errors = {}
  for path, value in ours.items():
    errors[path] = lab.relative_error(value, _reference_gradient(lab, path, value.shape, theirs))
  row = theirs["model.language_model.embed_tokens.weight"][lab.marker]
  table = ours["language_model.embed_tokens.embedding"]
  errors["<prm> row"] = lab.relative_error(table[lab.marker], row)
  print("\ngradients:", {path: f"{error:.0e}" for path, error in errors.items()})
  assert max(errors.values()) < 1e-4, errors


def _reference_gradient(lab, path, shape, theirs) -> np.ndarray:
  """Transformers' gradient in our layout; written apart from the loader's table."""
  if path == "reward_head.kernel":
    return theirs["lm_head.weight"][[lab.yes, lab.no]].T
  name = path.rsplit(".", 1)[0] + (".bias" if path.endswith(".bias") else ".weight")
  name = "model." + name
  if ".blocks." in name or ".layers." in name:
    stack = "blocks" if ".blocks." in name else "layers"
    parts = [theirs[name.replace(f".{stack}.", f".{stack}.{i}.")] for i in range(shape[0])]
    value = np.stack(parts)
  else:
    value = theirs[name]
  if path == "visual.patch_embed.proj.kernel":
    return value.reshape(len(value), -1).T
  return value.swapaxes(-1, -2) if path.endswith(".kernel") else value


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(lab, config, params, model, loss_case, remat):
  _, targets, batch = loss_case
  plain = jax.jit(jax.grad(_loss))(model, batch, targets)
  again = lab.model(dataclasses.replace(config, remat=remat), params)
  again = jax.jit(jax.grad(_loss))(again, batch, targets)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    assert lab.relative_error(b, a) < 1e-5


def test_bfloat16_compute(lab, config, params, model, torch_model):
  """bfloat16 activations against the float32 reference: at most 1e-2 on the logits."""
  config = dataclasses.replace(config, dtype="bfloat16")
  errors = []
  for seed, sizes in enumerate((((224, 224),), ((280, 392), (364, 224)), ())):
    sample = lab.draw(20 + seed, sizes)
    batch = lab.assemble(torch_model, [[sample]], T, P, R)
    ours = _forward(lab.model(config, params), batch)[0, : len(sample.markers)]
    with torch.no_grad():
      logits = torch_model(**sample.torch_inputs()).logits[0, sample.markers]
    errors.append(lab.relative_error(ours, logits[:, [lab.yes, lab.no]]))
  print("\nbfloat16:", [f"{e:.1e}" for e in errors])
  assert max(errors) < 1e-2
