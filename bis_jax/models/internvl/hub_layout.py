"""Which tensors of an InternVL checkpoint make up each of our parameters.

Two layouts: the release's ("hub": `vision_model.*`, `mlp1.*`, `language_model.*`), with
InternLM2.5's names or Qwen2.5's in the decoder, and Transformers' ("hf": `vision_tower.*`,
`multi_modal_projector.*`, `language_model.*`, or the same names as Transformers holds them in
memory).

The release fuses queries, keys and values: in the tower they are concatenated; in InternLM2.5 they
are grouped by key head in blocks of the head dim, here with 2 query heads per key head:

    wqkv  [q0 q1 k0 v0 q2 q3 k1 v1]    q_proj  [q0 q1 q2 q3]    k_proj  [k0 k1]    v_proj  [v0 v1]
"""

from collections.abc import Mapping
from typing import Any

from bis_jax.models.hub_layout import Layout, Renames, RowRanges
from bis_jax.models.internvl.config import InternVLConfig

_RELEASE: Renames = (
  (r"^vision_model\.(?=class_|position_|patch_)", "vision_model.embeddings."),
  (r"^vision_model\.layers\.", "vision_model.encoder.layers."),
  (r"^mlp1\.norm\.", "mlp1.0."),
  (r"^mlp1\.fc1\.", "mlp1.1."),
  (r"^mlp1\.fc2\.", "mlp1.3."),
  (r"^language_model\.", "language_model.model."),
)
_TRANSFORMERS: Renames = (
  (r"^vision_model\.class_embedding", "vision_tower.embeddings.cls_token"),
  (r"^vision_model\.position_embedding", "vision_tower.embeddings.position_embeddings"),
  (r"^vision_model\.patch_embedding", "vision_tower.embeddings.patch_embeddings.projection"),
  (r"^vision_model\.layers\.", "vision_tower.encoder.layer."),
  (r"\.attn\.proj\.", ".attention.projection_layer."),
  (r"\.attn\.", ".attention."),
  (r"\.norm1\.", ".layernorm_before."),
  (r"\.norm2\.", ".layernorm_after."),
  (r"\.ls([12])$", r".lambda_\1"),
  (r"^mlp1\.norm\.", "multi_modal_projector.layer_norm."),
  (r"^mlp1\.fc([12])\.", r"multi_modal_projector.linear_\1."),
  (r"^language_model\.", "language_model.model."),
)
_INTERNLM: Renames = (
  (r"\.embed_tokens\.", ".tok_embeddings."),
  (r"\.self_attn\.o_proj\.", ".attention.wo."),
  (r"\.self_attn\.[qkv]_proj\.", ".attention.wqkv."),
  (r"(language.*)\.mlp\.gate_proj\.", r"\1.feed_forward.w1."),
  (r"(language.*)\.mlp\.down_proj\.", r"\1.feed_forward.w2."),
  (r"(language.*)\.mlp\.up_proj\.", r"\1.feed_forward.w3."),
  (r"\.input_layernorm\.", ".attention_norm."),
  (r"\.post_attention_layernorm\.", ".ffn_norm."),
)
_FUSED_TOWER: Renames = ((r"\.attn\.[qkv]_proj\.", ".attn.qkv."),)

_IN_MEMORY = (
  (r"^model\.language_model\.", "language_model.model."),
  (r"^model\.(?=vision_tower|multi_modal_projector)", ""),
  (r"^lm_head\.", "language_model.lm_head."),
)

_TO_MEMORY = (
  (r"^language_model\.model\.", "model.language_model."),
  (r"^(?=vision_tower|multi_modal_projector)", "model."),
  (r"^language_model\.lm_head\.", "lm_head."),
)


def layout(config: InternVLConfig, checkpoint: Mapping[str, Any]) -> Layout:
  """Returns the layout of a checkpoint by its config.json; `model_type` "internvl" is "hf"."""
  released = checkpoint.get("model_type") != "internvl"
  internlm = released and config.text.architecture == "internlm2"
  names = _RELEASE + _FUSED_TOWER if released else _TRANSFORMERS
  names += _INTERNLM if internlm else ()
  head, table = ("output", "tok_embeddings") if internlm else ("lm_head", "embed_tokens")
  vision = config.vision
  width, patch = vision.hidden_size, (vision.patch_size, vision.patch_size)
  return Layout(
    lm_head=f"language_model.{head}.weight",
    embedding=f"language_model.model.{table}.weight",
    stacks=("vision_model.layers.", "language_model.layers."),
    names=names,
    aliases=_IN_MEMORY,
    in_memory=() if released else _TO_MEMORY,
    shapes={
      "vision_model.patch_embedding.kernel": (width, vision.num_channels, *patch),
      "vision_model.class_embedding": (1, 1, width),
      "vision_model.position_embedding": (1, vision.side**2 + 1, width),
    },
    fused=(_fused_tower(config) if released else {}) | (_fused_decoder(config) if internlm else {}),
  )


def _fused_tower(config: InternVLConfig) -> dict[str, tuple[RowRanges, int]]:
  width = config.vision.hidden_size
  return {
    f"vision_model.layers.attn.{part}_proj": (((i * width, (i + 1) * width),), 3 * width)
    for i, part in enumerate("qkv")
  }


def _fused_decoder(config: InternVLConfig) -> dict[str, tuple[RowRanges, int]]:
  text = config.text
  group = text.num_attention_heads // text.num_key_value_heads
  blocks = {"q": (0, group), "k": (group, group + 1), "v": (group + 1, group + 2)}
  starts = [key_head * (group + 2) for key_head in range(text.num_key_value_heads)]
  rows = text.num_key_value_heads * (group + 2) * text.head_dim
  return {
    f"language_model.layers.self_attn.{part}_proj": (
      tuple(((start + a) * text.head_dim, (start + b) * text.head_dim) for start in starts),
      rows,
    )
    for part, (a, b) in blocks.items()
  }
