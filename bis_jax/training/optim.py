"""AdamW with warm-up and cosine decay on a flat dict of parameters."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def schedule(optim: ConfigDict, steps: int) -> optax.Schedule:
  """Returns step -> learning rate: linear warm-up, then cosine decay to 0 at `steps`."""
  warmup = max(1, round(optim.warmup_fraction * steps))
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=optim.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
  )


def _decays(params: dict[str, jax.Array]) -> dict[str, bool]:
  return {path: path.endswith(("kernel", "embedding")) for path in params}  # no biases, no norms


def optimizer(
  optim: ConfigDict, steps: int, factor: dict[str, float]
) -> optax.GradientTransformation:
  def scale(updates, state, params=None):
    del params
    return {path: factor[path] * update for path, update in updates.items()}, state

  return optax.chain(
    optax.clip_by_global_norm(optim.clip),
    optax.scale_by_adam(
      b1=optim.b1, b2=optim.b2, eps=optim.eps, mu_dtype=jnp.dtype(optim.moment_dtype)
    ),
    optax.add_decayed_weights(optim.weight_decay, mask=_decays),
    optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
    optax.scale_by_learning_rate(schedule(optim, steps)),
  )
