"""AdamW with warm-up and cosine decay on a flat dict of parameters."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from bis_jax.models.param_tree import Params


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
  decayed = ("kernel", "embedding", "lora_a", "lora_b", "marker")  # no biases, no norms
  return {path: path.endswith(decayed) for path in params}


def _with_rounded_second_moments(
  adam: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Returns Adam with second moments in bfloat16 between steps, rounded at random."""

  # Rounded to the nearest they would stand still: a step changes them by less than half a unit.
  def init(params: Any) -> Any:
    state: Any = adam.init(params)
    nu = optax.tree.zeros_like(params, dtype=jnp.bfloat16)
    return state._replace(nu=nu)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    wide = state._replace(nu=optax.tree.cast(state.nu, jnp.float32))
    updates, after = adam.update(updates, wide, params)
    state: Any = after
    key = jax.random.fold_in(jax.random.key(0), state.count)
    nu = {path: _rounded_at_random(value, _of_path(key, path)) for path, value in state.nu.items()}
    return updates, state._replace(nu=nu)

  return optax.GradientTransformation(init, update)


def _of_path(key: jax.Array, path: str) -> jax.Array:
  return jax.random.fold_in(key, zlib.crc32(path.encode()))  # whichever others are with it


def _rounded_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
  """Returns float32 values as bfloat16, up with the probability that keeps their mean."""
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
  return cut.astype(jnp.bfloat16)


def optimizer(
  optim: ConfigDict, steps: int, factor: dict[str, float]
) -> optax.GradientTransformation:
  def scale(updates, state, params=None):
    del params
    return {path: factor[path] * update for path, update in updates.items()}, state

  adam = optax.scale_by_adam(
    b1=optim.b1, b2=optim.b2, eps=optim.eps, mu_dtype=jnp.dtype(optim.moment_dtype)
  )
  if optim.second_moment_dtype == "bfloat16":
    adam = _with_rounded_second_moments(adam)
  chain = optax.chain(
    optax.clip_by_global_norm(optim.clip),
    _from_host(adam) if optim.on_host else adam,
    optax.add_decayed_weights(optim.weight_decay, mask=_decays),
    optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
    optax.scale_by_learning_rate(schedule(optim, steps)),
  )
  return _in_float32(chain)


def _from_host(adam: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns Adam whose moments are in the host's memory, and a parameter's at a time on the device."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    scaled, mu, nu, back = {}, {}, {}, ()
    for path, gradient in updates.items():
      # The next moments wait for these to be away: else the compiler fetches all before the first use.
      there, gradient, _ = jax.lax.optimization_barrier(
        ((state.mu[path], state.nu[path]), gradient, back)
      )
      here = jax.device_put(there, jax.memory.Space.Device)
      own = state._replace(mu={path: here[0]}, nu={path: here[1]})
      after: Any = adam.update({path: gradient}, own)
      scaled[path], own = after[0][path], after[1]
      back = jax.device_put((own.mu[path], own.nu[path]), jax.memory.Space.Host)
      mu[path], nu[path] = back
    return scaled, state._replace(count=optax.safe_increment(state.count), mu=mu, nu=nu)

  return optax.GradientTransformation(adam.init, update)


def _in_float32(chain: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a chain for parameters of any dtype."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return chain.update(updates, state, optax.tree.cast(params, jnp.float32))

  return optax.GradientTransformation(
    lambda params: chain.init(optax.tree.cast(params, jnp.float32)), update
  )


def apply_updates(params: Params, updates: Any, step: jax.Array) -> Params:
  """Returns parameters after an update in float32, those in bfloat16 rounded at random."""
  # To the nearest most would stand still: an update is less than half a unit of its parameter.
  key = jax.random.fold_in(jax.random.key(1), step)
  after: Any = optax.apply_updates(optax.tree.cast(params, jnp.float32), updates)
  return {
    path: value.astype(params[path].dtype)
    if params[path].dtype != jnp.bfloat16
    else _rounded_at_random(value, _of_path(key, path))
    for path, value in after.items()
  }
