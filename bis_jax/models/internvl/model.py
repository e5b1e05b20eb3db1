"""InternVL as a step reward model: a batch of packed rows in, two logits a step marker out.

Sources: `modeling_internvl_chat.py` of the InternVL release and InternVLForConditionalGeneration in
Transformers; attribute names are the release's, but those of the decoder are Transformers'.

Array names end in their dims. One legend for the whole package: B rows, T tokens, D width, L tile
slots of a row, P patches of a tile, S = P + 1 with the class token, C values a patch, M image tokens
of a row (L * P / 4), N query heads, K key and value heads, H head dim, F mlp, V vocab, R step
markers a row.
"""

from collections.abc import Mapping

import jax
from flax import nnx

from bis_jax.models.decoder import place_features
from bis_jax.models.internvl.config import InternVLConfig
from bis_jax.models.internvl.text import TextModel
from bis_jax.models.internvl.vision import VisionTower
from bis_jax.models.layers import LayerNorm, Linear
from bis_jax.models.reward_head import RewardHead, at_markers


class Projector(nnx.Module):
  """Returns features [..., D of the text]: norm, linear, GELU, linear."""

  def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
    width, out = 4 * config.vision.hidden_size, config.text.hidden_size
    kwargs = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    self.norm = LayerNorm(width, epsilon=1e-5, **kwargs)
    self.fc1 = Linear(width, out, use_bias=True, rngs=rngs, **kwargs)
    self.fc2 = Linear(out, out, use_bias=True, rngs=rngs, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(jax.nn.gelu(self.fc1(self.norm(x)), approximate=False))


class InternVL(nnx.Module):
  """Returns float32 logits [B, R, 2] at the step markers of a batch, positive first.

  Layers are stacked on a leading axis and scanned. The module knows of no mesh: shard its state
  and its batch over Auto axes and jit.
  """

  def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
    self.vision_model = VisionTower(config, rngs)
    self.mlp1 = Projector(config, rngs)
    self.language_model = TextModel(config, rngs)
    self.reward_head = RewardHead(
      config.text.hidden_size, param_dtype=config.param_dtype, rngs=rngs
    )
    self.config = config

  def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Args are the arrays of a batch.

    Args:
      batch: `tokens` int32[B, T]; `segment_ids` int32[B, T], 0 padding; `positions` int32[B, T],
        from 0 in every sample; `patches` float32[B, L * P, C], tile behind tile; `image_index`
        int32[B, T], the image token among the row's M that stands in for token t, or -1;
        `marker_index` int32[B, R]; in training with drop path, `drop_path_key`, a random key.
        Further keys are not read.
    """
    x_BRD = at_markers(self.states(batch), batch["marker_index"])
    return self.reward_head(self.language_model.norm(x_BRD))

  def states(self, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the states [B, T, D] after the last layer, before the last norm."""
    b, _, values = batch["patches"].shape
    tiles_BLPC = batch["patches"].reshape(b, -1, self.config.vision.side**2, values)
    features = self.mlp1(self.vision_model(tiles_BLPC, batch.get("drop_path_key")))
    features_BMD = features.reshape(features.shape[0], -1, features.shape[-1])
    x_BTD = self.language_model.embed_tokens(batch["tokens"])
    x_BTD = place_features(x_BTD, features_BMD, batch["image_index"])
    return self.language_model(x_BTD, batch["positions"], batch["segment_ids"])

  def next_token_logits(self, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns float32 logits [B, T, V] of the token behind every token; for small models."""
    return self.language_model.next_token_logits(self.states(batch))
