"""InternVL as a step reward model.

Sources: `modeling_internvl_chat.py` of the InternVL release and InternVLForConditionalGeneration in
Transformers; attribute names are the release's, but those of the decoder are Transformers'.
"""

# Array names end in their dims. One legend for the whole package: B rows, T tokens, D width, L tile
# slots of a row, P patches of a tile, S = P + 1 with the class token, C values per patch, M image
# tokens of a row (L * P / 4), N query heads, K key and value heads, H head dim, h half of it, F
# mlp, V vocab, R step markers per row.

import jax
import jax.numpy as jnp
from flax import nnx

from bis_jax.models.internvl.config import InternVLConfig
from bis_jax.models.internvl.vision import VisionTower
from bis_jax.models.layers import MLP, LayerNorm, inverse_frequencies
from bis_jax.models.reward_model import Batch, RewardModel


class Projector(MLP):
  """Returns features [..., D of the text]: norm, linear, GELU, linear."""

  def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
    width, out = 4 * config.vision.hidden_size, config.text.hidden_size
    self.norm = LayerNorm(width, 1e-5, config)
    super().__init__(width, out, out, config, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return super().__call__(self.norm(x))


class InternVL(RewardModel):
  """See `RewardModel`."""

  # `patches` are float32[B, L * P, C], the patches of one tile after the other, `positions`
  # int32[B, T]; in training with drop path a batch holds a `random_key`.

  def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
    self.vision_model = VisionTower(config, rngs)
    self.mlp1 = Projector(config, rngs)
    super().__init__(config, rngs)

  def image_features(self, batch: Batch) -> jax.Array:
    b, _, values = batch["patches"].shape
    tiles_BLPC = batch["patches"].reshape(b, -1, self.config.vision.side**2, values)
    features = self.mlp1(self.vision_model(tiles_BLPC, batch.get("random_key")))
    return features.reshape(b, -1, features.shape[-1])

  def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rope(positions, self.config.text.head_dim, self.config.text.rope_theta)


def rope(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines [B, T, h]; source: LlamaModel and Qwen2Model in Transformers."""
  frequencies_h = inverse_frequencies(head_dim, theta)
  angles_BTh = positions_BT.astype(jnp.float32)[:, :, None] * frequencies_h[None, None]
  return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
