"""A run's parameters as flat dicts `{"visual.merger.mlp.0.kernel": array}`.

Freezing, sharding, learning rates and checkpoints use these paths and do not depend on the model.
"""

from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, jax.Array]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
  graph, state = nnx.split(model, nnx.Param)
  params: Any = flatten_dict(nnx.to_pure_dict(state), sep=".")
  return graph, params


def merge(graph: nnx.GraphDef, params: Params) -> nnx.Module:
  """The inverse of `split`."""
  return nnx.merge(graph, unflatten_dict(params, sep="."))
