"""Qwen2.5-VL against Transformers, float32 on CPU: every stage, and mutations.

Errors are ||ours - reference|| / ||reference||. `python -m pytest tests/models -s` prints the worst;
measured: 2e-6 or less at every stage.

Mutations of batches and configs are tests below. These mutations of the code were each tried once,
and `test_every_stage_equals_transformers` caught every one: causal mask one key short, or one ahead;
no segments in the mask; query heads dealt to the wrong key heads; another scale of the scores; rope
sections reversed, or interleaved as in Qwen3-VL; rows and columns exchanged in the vision rope; the
first instead of the last block of a period full; full blocks windowed; q, k and v in another order;
tanh for erf in the merger; image features placed one off; the wrong sign in a rotation; another norm
epsilon; Yes and No exchanged; no norm before the head.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from bis_jax.models.decoder import place_features
from bis_jax.models.qwen2_5_vl import vision
from tests.torch_reference import layer_output

LARGE = (704, 3072, 8)  # tokens, patch slots and markers of a row
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


def _budget(lab, sizes) -> tuple[int, int, int]:
  """Attention is computed at once for the small rows and in chunks of queries for the large."""
  return lab.row if sum(h * w for h, w in sizes) <= 364 * 364 else LARGE


@functools.partial(jax.jit, static_argnames="full")
def _block(block, x, rope, window, segment, full):
  return block(x, rope, window, segment, full)


_layer = jax.jit(layer_output)


def _stages(lab, model, batch):
  """The model's computation layer by layer, one named output per stage."""
  tower, decoder, config, out = model.visual, model.language_model, model.config, {}
  rope = vision.axial_rope(
    batch["patch_position"], config.vision.head_dim, config.vision.rope_theta
  )
  x = out["patch_embed"] = tower.patch_embed["proj"](batch["patches"])
  for i in range(config.vision.depth):
    block = jax.tree.map(lambda array, i=i: array[i], tower.blocks)
    full = i in config.vision.fullatt_block_indexes
    x = _block(block, x, rope, batch["patch_window"], batch["patch_segment"], full)
    out[f"block {i} {'full' if full else 'windowed'}"] = x
  features = out["merger"] = tower.merger(x)
  x = decoder.embed_tokens(batch["tokens"])
  x = out["embeddings"] = place_features(x, features, batch["image_index"])
  rope = model.rope(batch["positions"])
  for i in range(config.text.num_hidden_layers):
    layer = jax.tree.map(lambda array, i=i: array[i], decoder.layers)
    x = out[f"layer {i}"] = _layer(layer, x, rope, batch["segment_ids"])
  out["final states"] = decoder.norm(x)
  out["logits"] = lab.forward(model, batch)
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
  """At most 1e-5 at every stage, for every size in the list and 0 to 3 images.

  The mutations further down show what this would catch.
  """
  sample = lab.draw(len(sizes), sizes)
  ours = _stages(lab, model, lab.assemble(torch_model, [[sample]], *_budget(lab, sizes)))
  ours = _in_reference_order(lab, sample, ours)
  reference = _reference_stages(torch_model, sample, lab)
  assert ours.keys() == reference.keys()
  errors = {name: lab.relative_error(ours[name], value) for name, value in reference.items()}
  print(f"\n{_id(sizes)}: worst {max(errors.values()):.1e}")
  assert max(errors.values()) < 1e-5, errors


def _widen_windows(batch):
  """Windowed blocks let every patch see its whole 64-slot block."""
  return {**batch, "patch_window": np.minimum(batch["patch_window"], 1)}


def _mix_images(batch):
  """Full-attention blocks let images see each other."""
  return {**batch, "patch_segment": np.minimum(batch["patch_segment"], 1)}


def _see_padding(batch):
  """Empty patch slots count as part of the first image."""
  return {**batch, "patch_segment": np.maximum(batch["patch_segment"], 1)}


def _mix_samples(batch):
  """Samples of a row attend to the samples before them in the row."""
  return {**batch, "segment_ids": np.minimum(batch["segment_ids"], 1)}


def _leave_window_order(batch):
  """Image tokens read the merged features in window order, without the inverse permutation."""
  return {**batch, "image_index": _reorder(batch["image_index"], lambda rank: np.arange(len(rank)))}


def _invert_window_order(batch):
  """The permutation into windows instead of its inverse."""
  return {**batch, "image_index": _reorder(batch["image_index"], np.argsort)}


def _exchange_patch_axes(batch):
  """Rows and columns of patches exchanged in the vision rope."""
  return {**batch, "patch_position": batch["patch_position"][..., ::-1]}


def _drop_mrope(batch):
  """Image tokens have the positions of text."""
  return {**batch, "positions": np.repeat(batch["positions"][:, :1], 3, axis=1)}


def _reorder(image_index, change):
  """The index with the ranks of its used entries (its permutation) changed."""
  used = image_index[image_index >= 0]
  out = image_index.copy()
  out[image_index >= 0] = np.sort(used)[change(np.argsort(np.argsort(used)))]
  return out


MUTATIONS = (
  _widen_windows,
  _mix_images,
  _see_padding,
  _mix_samples,
  _leave_window_order,
  _invert_window_order,
  _exchange_patch_axes,
  _drop_mrope,
)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__.strip("_"))
def test_a_wrong_mask_order_or_position_shows(lab, model, torch_model, mutate):
  """Each mutation moves the logits by at least a hundred times the allowed error."""
  samples = [lab.draw(3, ((196, 252), (140, 224))), lab.draw(4, ())]
  batch = lab.assemble(torch_model, [samples], *lab.row)
  right, wrong = lab.forward(model, batch), lab.forward(model, mutate(batch))
  assert lab.relative_error(wrong, right) > 1e-3


def test_an_inverse_permutation_hides_at_448_px(lab, torch_model):
  """Why the sizes above are not all multiples of 448: there the permutation is its own inverse."""
  for side, hidden in ((448, True), (364, False)):
    batch = lab.assemble(torch_model, [[lab.draw(3, ((side, side),))]], *LARGE)
    mutated = _invert_window_order(batch)
    assert np.array_equal(mutated["image_index"], batch["image_index"]) == hidden


def test_a_wrong_rope_section_shows(lab, config, params, model, torch_model):
  """Sections (3, 3, 2) for (2, 3, 3): same sum, same parameters, other angles."""
  batch = lab.assemble(torch_model, [[lab.draw(3, ((280, 392),))]], *lab.row)
  section = dataclasses.replace(config.text, mrope_section=(3, 3, 2))
  mutated = lab.model(dataclasses.replace(config, text=section), params)
  assert lab.relative_error(lab.forward(mutated, batch), lab.forward(model, batch)) > 1e-3
