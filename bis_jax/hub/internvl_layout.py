"""Which tensors of an InternVL checkpoint make up each of our parameters.

Two layouts: the release's ("hub": `vision_model.*`, `mlp1.*`, `language_model.*`), with InternLM2.5's
names or Qwen2.5's in the decoder, and Transformers' ("hf": `vision_tower.*`,
`multi_modal_projector.*`, `language_model.*`, or the same names as Transformers holds them in memory).

The release fuses queries, keys and values. In the tower they lie one behind the other; in InternLM2.5
by key head, here with 2 query heads a key head, in blocks of the head dim:

    wqkv  [q0 q1 k0 v0 q2 q3 k1 v1]    q_proj  [q0 q1 q2 q3]    k_proj  [k0 k1]    v_proj  [v0 v1]
"""

import functools
import re

from bis_jax.hub.layout import HubTensor, Layout
from bis_jax.models.internvl.config import InternVLConfig

_STACKS = (r"^(vision_model\.layers)\.", r"^(language_model\.layers)\.")

_Names = tuple[tuple[str, str], ...]  # a part of our path, as a regex, and its name in the file

_RELEASE: _Names = (
  (r"^vision_model\.(?=class_|position_|patch_)", "vision_model.embeddings."),
  (r"^vision_model\.layers\.", "vision_model.encoder.layers."),
  (r"^mlp1\.norm\.", "mlp1.0."),
  (r"^mlp1\.fc1\.", "mlp1.1."),
  (r"^mlp1\.fc2\.", "mlp1.3."),
  (r"^language_model\.", "language_model.model."),
)
_TRANSFORMERS: _Names = (
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
_INTERNLM: _Names = (
  (r"\.embed_tokens\.", ".tok_embeddings."),
  (r"\.self_attn\.o_proj\.", ".attention.wo."),
  (r"\.self_attn\.[qkv]_proj\.", ".attention.wqkv."),
  (r"(language.*)\.mlp\.gate_proj\.", r"\1.feed_forward.w1."),
  (r"(language.*)\.mlp\.down_proj\.", r"\1.feed_forward.w2."),
  (r"(language.*)\.mlp\.up_proj\.", r"\1.feed_forward.w3."),
  (r"\.input_layernorm\.", ".attention_norm."),
  (r"\.post_attention_layernorm\.", ".ffn_norm."),
)
_FUSED_TOWER: _Names = ((r"\.attn\.[qkv]_proj\.", ".attn.qkv."),)

_IN_MEMORY = (
  (r"^model\.language_model\.", "language_model.model."),
  (r"^model\.(?=vision_tower|multi_modal_projector)", ""),
  (r"^lm_head\.", "language_model.lm_head."),
)


def internvl_layout(config: InternVLConfig, model_type: str) -> Layout:
  """Returns the layout of an InternVL checkpoint.

  Args:
    config: the model's.
    model_type: of the checkpoint's config.json: "internvl" is Transformers', all else the release's.
  """
  released = model_type != "internvl"
  internlm = released and config.text.architecture == "internlm2"
  names = _RELEASE + _FUSED_TOWER if released else _TRANSFORMERS
  names += _INTERNLM if internlm else ()
  head, table = ("output", "tok_embeddings") if internlm else ("lm_head", "embed_tokens")
  return Layout(
    tensor=functools.partial(_tensor, config, names, released, internlm),
    our_spelling=lambda key: _renamed(key, _IN_MEMORY),
    file_spelling=lambda key: key,
    lm_head=f"language_model.{head}.weight",
    embedding=f"language_model.model.{table}.weight",
  )


def _tensor(
  config: InternVLConfig,
  names: _Names,
  released: bool,
  internlm: bool,
  path: str,
  shape: tuple[int, ...],
) -> HubTensor:
  key = re.sub(r"\.(kernel|scale|embedding)$", ".weight", path)
  stack = next((p for p in _STACKS if re.match(p, path)), None)
  keys, layers = (_renamed(key, names),), shape[0]
  if stack:
    shape = shape[1:]
    keys = tuple(_renamed(re.sub(stack, rf"\1.{layer}.", key), names) for layer in range(layers))
  transposed = path.endswith(".kernel")
  rows = None
  if part := re.search(r"\.([qkv])_proj\.", path):
    if path.startswith("vision_model.") and released:
      rows = _tower_rows(config, part[1])
    elif path.startswith("language_model.") and internlm:
      rows = _internlm_rows(config, part[1])
  if path == "vision_model.patch_embedding.kernel":
    vision = config.vision
    shape = (shape[1], vision.num_channels, vision.patch_size, vision.patch_size)
  elif transposed:
    shape = shape[::-1]
  elif path == "vision_model.class_embedding":
    shape = (1, 1, *shape)
  elif path == "vision_model.position_embedding":
    shape = (1, *shape)
  if rows:
    whole = _fused_rows(config) if internlm and path.startswith("language") else 3 * shape[0]
    shape = (whole, *shape[1:])
  return HubTensor(keys, shape, stack is not None, transposed, rows)


def _tower_rows(config: InternVLConfig, part: str) -> tuple[tuple[int, int], ...]:
  width, place = config.vision.hidden_size, "qkv".index(part)
  return ((place * width, (place + 1) * width),)


def _internlm_rows(config: InternVLConfig, part: str) -> tuple[tuple[int, int], ...]:
  text = config.text
  group = text.num_attention_heads // text.num_key_value_heads
  first, last = {"q": (0, group), "k": (group, group + 1), "v": (group + 1, group + 2)}[part]
  starts = [k * (group + 2) for k in range(text.num_key_value_heads)]
  return tuple(((k + first) * text.head_dim, (k + last) * text.head_dim) for k in starts)


def _fused_rows(config: InternVLConfig) -> int:
  text = config.text
  return (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim


def _renamed(key: str, names: _Names) -> str:
  for pattern, name in names:
    key = re.sub(pattern, name, key)
  return key
