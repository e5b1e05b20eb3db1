"""A run's adapters as a folder of Hugging Face's PEFT, beside the checkpoint that it started from.

adapter_config.json         rank, alpha, the adapted modules, the base
adapter_model.safetensors   adapters, the step marker's row, the rows of `Yes` and `No`, and
                            whole modules that were trained
bis_jax.json                what scoring needs, and checksums of the base (`settings.exported`)
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError

from bis_jax import files
from bis_jax.errors import UserError
from bis_jax.hub import hf_folder, weights
from bis_jax.hub.tensor_reader import StoredTensor, assemble, open_tensors, read_parameter
from bis_jax.models import backbones
from bis_jax.models.adaptation import ADAPTERS, MARKER_PATH, is_added
from bis_jax.models.backbone import Processor
from bis_jax.models.hub_layout import EMBEDDING_PATH, REWARD_HEAD_PATH, HubTensor, Layout
from bis_jax.models.model_config import ModelConfig
from bis_jax.models.param_tree import Params

_PREFIX = "base_model.model."
_TENSORS = "adapter_model.safetensors"


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
  run: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
  """Writes the adapters and the other parameters in `trained`; `out` is new or empty.

  `base_name` is what PEFT loads the base by; `run` as in `hf_folder.write`. Raises UserError if the
  base's files fuse what is adapted.
  """
  own = config.adaptation
  assert own
  layout = _layout(config, base)
  places = _places(params, trained, config, layout)
  tensors = {
    name: _tensor(params[path], place, layer)
    for path, place in places.items()
    for layer, name in enumerate(place.keys)
  }
  special, ours = processor.prompt.special, (*ADAPTERS, MARKER_PATH, REWARD_HEAD_PATH)
  (embedding,), (head,) = (
    _modules(places, path, ".token_adapter") for path in (MARKER_PATH, REWARD_HEAD_PATH)
  )
  content = {
    "peft_type": "LORA",
    "base_model_name_or_path": base_name,
    "r": own.rank,
    "lora_alpha": own.alpha,
    "lora_dropout": own.dropout,
    "bias": "none",
    "inference_mode": True,
    "target_modules": _modules(places, ADAPTERS, ".lora_"),
    "modules_to_save": _modules({p: v for p, v in places.items() if not p.endswith(ours)}, "", ".")
    or None,
    "trainable_token_indices": {
      embedding.split(".")[-1]: [special.prm],
      head.split(".")[-1]: [special.yes, special.no],
    },
  }
  with files.new_folder(out) as part:
    files.write_json(part / weights.ADAPTER_CONFIG, content)
    with files.written_locally(part) as local:
      arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
      safetensors.numpy.save_file(arrays, local / _TENSORS, {"format": "pt"})
      hf_folder.write_tokenizer(local, processor.tokenizer)
    preprocessor = backbones.get(config.backbone).preprocessor_json(processor.images)
    files.write_json(part / "preprocessor_config.json", preprocessor)
    for name, held in (run or {}).items():
      files.write_json(part / name, held)
    files.write_text(part / "README.md", card)


def find_base(folder: epath.Path, base: str | None) -> tuple[str, epath.Path]:
  """Returns the name and the folder of the base of adapters, `base` or what their config names."""
  remedy = "export the adapters again with --adapter"
  held = files.read_json(folder / weights.ADAPTER_CONFIG, remedy)
  name = base or (held.get("base_model_name_or_path") if isinstance(held, dict) else None)
  if not isinstance(name, str):
    raise UserError(f"{folder / weights.ADAPTER_CONFIG} names no base: {remedy}")
  try:
    return name, weights.find_checkpoint(name)
  except FileNotFoundError as error:
    raise UserError(
      f"the base of the adapters in {folder} is missing: name it with --base ({error})"
    ) from error


def read(
  folder: epath.Path,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  trained: Mapping[str, jax.ShapeDtypeStruct],
  config: ModelConfig,
  base: epath.Path,
) -> Params:
  """Returns the parameters in `trained`, of a model of `shapes`, from a folder that `write` wrote."""
  places = _places(shapes, set(trained), config, _layout(config, base))
  file, stored = folder / _TENSORS, {}
  try:
    with open_tensors(file) as opened:
      for key in opened.keys():  # noqa: SIM118  (not a dict)
        view = opened.get_slice(key)
        stored[key] = StoredTensor(file, key, tuple(view.get_shape()), view.get_dtype())
  except (FileNotFoundError, SafetensorError) as error:
    raise UserError(f"{file} is missing or damaged ({error}): get the folder again") from error
  wanted = {key: place.shape for place in places.values() for key in place.keys}
  if problems := weights.differences(stored, wanted):
    raise weights.WeightsError(
      f"the adapters in {folder} are not those that its bis_jax.json describes: get the folder again",
      problems,
    )
  return {
    path: assemble(
      shape, functools.partial(read_parameter, places[path], [stored[k] for k in places[path].keys])
    )
    for path, shape in trained.items()
  }


def _layout(config: ModelConfig, base: epath.Path) -> Layout:
  return backbones.get(config.backbone).layout(config, weights.read_config(base)[0])


def _places(
  shapes: Mapping[str, Any], trained: set[str], config: ModelConfig, layout: Layout
) -> dict[str, HubTensor]:
  """Returns the place of what a folder holds: what trains, and all of a module of which a part does."""
  own = config.adaptation
  assert own
  base = layout.tensors({path: shape for path, shape in shapes.items() if not is_added(path)})
  whole = {
    path.rpartition(".")[0]
    for path in trained - {REWARD_HEAD_PATH, EMBEDDING_PATH}
    if not is_added(path)
  }
  places = {
    path: _renamed(place, layout, path)
    for path, place in base.items()
    if path.rpartition(".")[0] in whole
  }
  for path in sorted(trained):
    if path.endswith(ADAPTERS):
      stem, _, part = path.rpartition(".lora.")
      kernel = _renamed(base[f"{stem}.kernel"], layout, stem)
      rows, *inner = kernel.shape
      shape = (own.rank, *inner) if part == "lora_a" else (rows, own.rank, *[1] * (len(inner) - 1))
      name = {"lora_a": "lora_A", "lora_b": "lora_B"}[part]  # of the convolution too
      keys = tuple(key.removesuffix("weight") + f"{name}.weight" for key in kernel.keys)
      places[path] = HubTensor(keys, shape, kernel.stacked, transposed=True)
  width = config.text.hidden_size
  for path, key, rows in (
    (MARKER_PATH, layout.embedding, 1),
    (REWARD_HEAD_PATH, layout.lm_head, 2),
  ):
    delta = layout.in_memory_name(key).replace("weight", "token_adapter.trainable_tokens_delta")
    places[path] = HubTensor((_PREFIX + delta,), (rows, width), False, path == REWARD_HEAD_PATH)
  return places


def _renamed(place: HubTensor, layout: Layout, stem: str) -> HubTensor:
  if place.row_ranges:
    raise UserError(
      f"{stem} is a part of {place.keys[0]} in the base's files, which PEFT adapts as a whole: export "
      "the merged model, without --adapter"
    )
  names = tuple(_PREFIX + layout.in_memory_name(key) for key in place.keys)
  return HubTensor(names, place.shape, place.stacked, place.transposed)


def _modules(places: Mapping[str, HubTensor], ends: str | tuple[str, ...], mark: str) -> list[str]:
  """Returns the modules of the parameters whose paths end in `ends`: their names before `mark`."""
  names = {name for path, place in places.items() if path.endswith(ends) for name in place.keys}
  return sorted({name.removeprefix(_PREFIX).rpartition(mark)[0] for name in names})


def _tensor(param: jax.Array, place: HubTensor, layer: int) -> np.ndarray:
  value = np.asarray(param[layer] if place.stacked else param, np.float32)
  return (value.T if place.transposed else value).reshape(place.shape)
