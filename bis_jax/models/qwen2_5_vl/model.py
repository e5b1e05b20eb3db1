"""Qwen2.5-VL as a step reward model: a batch of packed rows in, two logits a step marker out.

Source: Qwen2_5_VLForConditionalGeneration in Transformers; attribute names are its own, so that
the key table of `bis_jax.hub.weights` is nearly the identity.

Array names end in their dims. One legend for the whole package: B rows, T tokens, D width, P patch
slots, C values a patch, M merged image features (P / 4), N query heads, K key and value heads,
H head dim, F mlp, V vocab, R step markers a row.
"""

from collections.abc import Mapping

import jax
from flax import nnx

from bis_jax.models.decoder import place_features
from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from bis_jax.models.qwen2_5_vl.text import TextModel
from bis_jax.models.qwen2_5_vl.vision import VisionTower
from bis_jax.models.reward_head import RewardHead, at_markers


class Qwen2_5_VL(nnx.Module):
  """Returns float32 logits [B, R, 2] at the step markers of a batch, positive first.

  Layers are stacked on a leading axis and scanned. The module knows of no mesh: shard its state
  and its batch over Auto axes and jit.
  """

  def __init__(self, config: Qwen2_5_VLConfig, rngs: nnx.Rngs):
    self.visual = VisionTower(config, rngs)
    self.language_model = TextModel(config, rngs)
    self.reward_head = RewardHead(
      config.text.hidden_size, param_dtype=config.param_dtype, rngs=rngs
    )
    self.config = config

  def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Args are the arrays of a batch; see `bis_jax.inputs.pipeline` for their making.

    Args:
      batch: `tokens` int32[B, T]; `segment_ids` int32[B, T], 0 padding; `positions` int32[B, 3, T];
        `patches` float32[B, P, C]; `patch_position` int32[B, P, 2], row and column in patches;
        `patch_window` and `patch_segment` int32[B, P], 0 padding; `image_index` int32[B, T], the
        merged feature that stands in for token t, or -1; `marker_index` int32[B, R]. Further keys
        are not read.
    """
    x_BRD = at_markers(self.states(batch), batch["marker_index"])
    return self.reward_head(self.language_model.norm(x_BRD))

  def states(self, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the states [B, T, D] after the last layer, before the last norm."""
    features_BMD = self.visual(
      batch["patches"], batch["patch_position"], batch["patch_window"], batch["patch_segment"]
    )
    x_BTD = self.language_model.embed_tokens(batch["tokens"])
    x_BTD = place_features(x_BTD, features_BMD, batch["image_index"])
    return self.language_model(x_BTD, batch["positions"], batch["segment_ids"])

  def next_token_logits(self, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns float32 logits [B, T, V] of the token behind every token; for small models."""
    return self.language_model.next_token_logits(self.states(batch))
