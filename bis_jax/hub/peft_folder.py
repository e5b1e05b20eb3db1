"""A run's adapters as a folder of Hugging Face's PEFT, beside the checkpoint that it started from.

adapter_config.json         rank, alpha, the adapted modules, the base
adapter_model.safetensors   adapters, the step marker's row, the rows of `Yes` and `No`, and
                            whole modules that were trained
"""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from bis_jax import files
from bis_jax.errors import UserError
from bis_jax.hub import hf_folder, weights
from bis_jax.models import backbones
from bis_jax.models.adaptation import ADAPTERS, MARKER_PATH, is_adapter
from bis_jax.models.backbone import Processor
from bis_jax.models.hub_layout import EMBEDDING_PATH, REWARD_HEAD_PATH, HubTensor
from bis_jax.models.model_config import ModelConfig

_PREFIX = "base_model.model."


def write(
  out: epath.Path,
  params: Mapping[str, jax.Array],
  trained: set[str],
  config: ModelConfig,
  processor: Processor,
  *,
  base: epath.Path,
  base_name: str,
  card: str,
) -> None:
  """Writes the adapters and the other parameters in `trained`; `out` is new or empty.

  `base_name` is what PEFT loads the base by. Raises UserError if the base's files fuse what is adapted.
  """
  own = config.adaptation
  assert own
  tensors, targets, whole = {}, [], []
  layout = backbones.get(config.backbone).layout(config, weights.read_config(base)[0])
  places = layout.tensors({path: v for path, v in params.items() if not is_adapter(path)})
  modules = collections.defaultdict(list)  # of trained parameters, by path without the last part
  for path in trained - {REWARD_HEAD_PATH, EMBEDDING_PATH}:
    if not is_adapter(path):
      modules[path.rpartition(".")[0]].append(path)
  for stem in modules:
    for path in (path for path in places if path.rpartition(".")[0] == stem):
      for layer, name in enumerate(_names(places[path], layout, stem)):
        whole.append(name.rpartition(".")[0])
        tensors[name] = _tensor(params[path], places[path], layer)
  for path in sorted(trained):
    if path.endswith(ADAPTERS):
      stem, _, part = path.rpartition(".lora.")
      place = places[f"{stem}.kernel"]
      for layer, name in enumerate(_names(place, layout, stem)):
        module, kernel = name.removesuffix(".weight"), params[path]
        targets.append(module)
        value = np.asarray(kernel[layer] if place.stacked else kernel, np.float32).T
        inner = place.shape[1:] if part == "lora_a" else (own.rank, *[1] * (len(place.shape) - 2))
        name = {"lora_a": "lora_A", "lora_b": "lora_B"}[part]  # of the convolution too
        tensors[f"{module}.{name}.weight"] = value.reshape(len(value), *inner)
  delta = "token_adapter.trainable_tokens_delta"
  embedding, head = (layout.in_memory_name(key) for key in (layout.embedding, layout.lm_head))
  tensors[embedding.replace("weight", delta)] = np.asarray(params[MARKER_PATH], np.float32)[None]
  tensors[head.replace("weight", delta)] = np.asarray(params[REWARD_HEAD_PATH], np.float32).T
  special = processor.prompt.special
  content = {
    "peft_type": "LORA",
    "base_model_name_or_path": base_name,
    "r": own.rank,
    "lora_alpha": own.alpha,
    "lora_dropout": own.dropout,
    "bias": "none",
    "inference_mode": True,
    "target_modules": sorted(set(targets)),
    "modules_to_save": sorted(set(whole)) or None,
    "trainable_token_indices": {
      embedding.split(".")[-2]: [special.prm],
      head.split(".")[-2]: [special.yes, special.no],
    },
  }
  with files.new_folder(out) as part:
    files.write_json(part / "adapter_config.json", content)
    with files.written_locally(part) as local:
      arrays = {_PREFIX + name: np.ascontiguousarray(value) for name, value in tensors.items()}
      safetensors.numpy.save_file(arrays, local / "adapter_model.safetensors", {"format": "pt"})
      hf_folder.write_tokenizer(local, processor.tokenizer)
    preprocessor = backbones.get(config.backbone).preprocessor_json(processor.images)
    files.write_json(part / "preprocessor_config.json", preprocessor)
    files.write_text(part / "README.md", card)


def _names(place: HubTensor, layout: Any, stem: str) -> list[str]:
  if place.row_ranges:
    raise UserError(
      f"{stem} is a part of {place.keys[0]} in the base's files, which PEFT adapts as a whole: export "
      "the merged model, without --adapter"
    )
  return [layout.in_memory_name(key) for key in place.keys]


def _tensor(param: jax.Array, place: HubTensor, layer: int) -> np.ndarray:
  value = np.asarray(param[layer] if place.stacked else param, np.float32)
  return (value.T if place.transposed else value).reshape(place.shape)
