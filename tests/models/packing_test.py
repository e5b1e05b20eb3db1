"""Packed rows: every sample as if it were alone, independent of the others."""

import jax
import numpy as np
import pytest

from bis_jax.models.decoder import place_features


@pytest.fixture(scope="module")
def packed(lab, torch_model):
  """Three samples: with two images, with none, with one; and the row that packs them."""
  samples = [lab.draw(5, ((196, 252), (140, 140))), lab.draw(6, ()), lab.draw(7, ((140, 224),))]
  for i, sample in enumerate(samples):
    sample.markers = sample.markers[: 3 - i]  # of unequal number
  return samples, lab.assemble(torch_model, [samples], *lab.row)


def test_packed_rows_equal_each_sample_alone(lab, model, torch_model, packed):
  samples, batch = packed
  together = lab.forward(model, batch)[0]
  start = 0
  for sample in samples:
    alone = lab.forward(model, lab.assemble(torch_model, [[sample]], *lab.row))[0]
    n = len(sample.markers)
    assert lab.relative_error(together[start : start + n], alone[:n]) < 1e-5
    start += n


def test_left_out_images_and_padding_change_nothing(lab, model, torch_model, packed):
  """An image that no token reads, and other values in every empty slot, leave the logits alone."""
  samples, batch = packed
  left_out = lab.assemble(torch_model, [[lab.draw(8, ((140, 168),))]], *lab.row)
  with_image = dict(batch)
  for key in ("patches", "patch_position", "patch_window", "patch_segment"):
    extra = left_out[key]
    offset = {"patch_window": 1000, "patch_segment": 1000}.get(key, 0)
    with_image[key] = batch[key].copy()
    with_image[key][:, -256:] = extra[:, :256] + np.asarray(offset, extra.dtype)
  padding = batch["segment_ids"] == 0
  with_image["tokens"] = np.where(padding, 77, batch["tokens"])
  with_image["positions"] = np.where(padding[:, None], 9, batch["positions"])
  n = sum(len(sample.markers) for sample in samples)
  ours, plain = lab.forward(model, with_image)[0, :n], lab.forward(model, batch)[0, :n]
  assert lab.relative_error(ours, plain) < 1e-6


def test_no_gradient_crosses_samples(lab, model, packed):
  """The logits of each sample have gradient exactly 0 by the inputs of the others and of padding."""
  samples, batch = packed
  counts = [len(sample.markers) for sample in samples]
  owner_of_marker = np.repeat(np.arange(1, len(samples) + 1), counts)
  image_owner = np.array([0, 1, 1, 3])[batch["patch_segment"][0]]

  @jax.jit
  def pull(model, patches, embeddings, weight_R):
    def logits(patches, embeddings):
      features = model.visual(
        patches, batch["patch_position"], batch["patch_window"], batch["patch_segment"]
      )
      x = place_features(embeddings, features, batch["image_index"])
      x = model.language_model(x, model.rope(batch["positions"]), batch["segment_ids"])
      x = jax.numpy.take_along_axis(x, batch["marker_index"][:, :, None], axis=1)
      return model.reward_head(model.language_model.norm(x))[0, :, 0]

    return jax.vjp(logits, patches, embeddings)[1](weight_R)

  embeddings = model.language_model.embed_tokens(batch["tokens"])
  for segment in range(1, len(samples) + 1):
    weight = np.zeros(lab.row[2], np.float32)
    weight[: len(owner_of_marker)] = owner_of_marker == segment
    gradients = pull(model, batch["patches"], embeddings, weight)
    by_patch, by_token = (np.abs(np.asarray(g[0])).sum(axis=-1) for g in gradients)
    assert by_token[batch["segment_ids"][0] == segment].max() > 0
    assert by_token[batch["segment_ids"][0] != segment].max() == 0
    assert by_patch[image_owner != segment].max() == 0
    if segment in image_owner:
      assert (by_patch[image_owner == segment] > 0).all()
