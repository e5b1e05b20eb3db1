"""The backbones a config can name: their sizes and how their parameters are sharded."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax.models.internvl import InternVL, InternVLConfig
from bis_jax.models.param_tree import split
from bis_jax.models.qwen2_5_vl import Qwen2_5_VL, Qwen2_5_VLConfig
from bis_jax.parallel.sharding import P, parameter_shardings

ModelConfig = Qwen2_5_VLConfig | InternVLConfig

# backbone -> size -> model config, given the number of token ids in use
SIZES: dict[str, dict[str, Callable[[int], ModelConfig]]] = {
  "qwen2_5_vl": {
    "tiny": Qwen2_5_VLConfig.tiny,
    "toy": Qwen2_5_VLConfig.toy,
    "3b": lambda vocab_size: Qwen2_5_VLConfig.qwen_3b(),
    "7b": lambda vocab_size: Qwen2_5_VLConfig.qwen_7b(),
  },
  "internvl": {
    "tiny": InternVLConfig.tiny,
    "toy": InternVLConfig.toy,
    "2.5-8b": lambda vocab_size: InternVLConfig.internvl2_5_8b(),
    "3-8b": lambda vocab_size: InternVLConfig.internvl3_8b(),
    "3-14b": lambda vocab_size: InternVLConfig.internvl3_14b(),
  },
}

# Kernels are [in, out], stacked layers lead with [layer]; widths split over fsdp, heads and
# hidden units over tensor. Vectors are small and stay whole.
SHARDING: tuple[tuple[str, P], ...] = (
  (r"\.embed_tokens\.embedding$", P("tensor", "fsdp")),
  (r"layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.kernel$", P(None, "fsdp", "tensor")),
  (r"layers\..*\.(o_proj|down_proj)\.kernel$", P(None, "tensor", "fsdp")),
  (r"blocks\..*\.(qkv|gate_proj|up_proj)\.kernel$", P(None, "fsdp", "tensor")),
  (r"blocks\..*\.(proj|down_proj)\.kernel$", P(None, "tensor", "fsdp")),
  (r"patch_embed\.proj\.kernel$", P("fsdp", "tensor")),
  (r"merger\.mlp\.0\.kernel$", P("fsdp", "tensor")),
  (r"merger\.mlp\.2\.kernel$", P("tensor", "fsdp")),
  (r"vision_model\.layers\..*\.fc1\.kernel$", P(None, "fsdp", "tensor")),
  (r"vision_model\.layers\..*\.(proj|fc2)\.kernel$", P(None, "tensor", "fsdp")),
  (r"vision_model\.patch_embedding\.kernel$", P("fsdp", "tensor")),
  (r"vision_model\.position_embedding$", P(None, "fsdp")),
  (r"mlp1\.fc1\.kernel$", P("fsdp", "tensor")),
  (r"mlp1\.fc2\.kernel$", P("tensor", "fsdp")),
  (r"reward_head\.kernel$", P("fsdp", None)),
  (r"(bias|scale|weight|ls[12]|class_embedding)$", P()),
)


def model_config(model: ConfigDict, vocab_size: int) -> ModelConfig:
  """Returns the model config that `config.model` names.

  Args:
    model: `config.model`.
    vocab_size: number of token ids in use; the embedding of a published size must hold them all.

  Raises:
    ValueError: the tokenizer has more tokens than the model has rows.
  """
  config = SIZES[model.backbone][model.size](-(-vocab_size // 64) * 64)
  if vocab_size > config.text.vocab_size:
    raise ValueError(
      f"the tokenizer has {vocab_size} tokens, size {model.size!r} of {model.backbone} only "
      f"{config.text.vocab_size} rows: set config.inputs.tokenizer to the tokenizer of the weights"
    )
  own = {"drop_path": model.drop_path} if model.backbone == "internvl" else {}
  return dataclasses.replace(
    config, dtype=model.dtype, remat=model.remat, attention=model.attention, **own
  )


def build(config: ModelConfig, seed: int) -> nnx.Module:
  """Returns the model with random weights."""
  model = InternVL if isinstance(config, InternVLConfig) else Qwen2_5_VL
  return model(config, rngs=nnx.Rngs(seed))


def structure(
  config: ModelConfig, mesh: Mesh
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
  """Returns the model's structure and what every parameter is and where it lives; makes no array."""
  graph, shapes = split(nnx.eval_shape(lambda: build(config, 0)))
  shardings = parameter_shardings(mesh, SHARDING, shapes)
  return graph, {
    path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[path])
    for path, shape in shapes.items()
  }
