"""Hugging Face weights in and out: safetensors streamed into sharded parameters and back.

The backbone's `hub_layout` maps parameters to tensors. Only safetensors are read: no pickles, and no
code of a checkpoint.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError

from bis_jax import files
from bis_jax.console import log
from bis_jax.errors import UserError
from bis_jax.hub import remote_tensors
from bis_jax.hub.tensor_reader import StoredTensor, assemble, by_rows, open_tensors, read_parameter
from bis_jax.models import backbones
from bis_jax.models.hub_layout import EMBEDDING_PATH, REWARD_HEAD_PATH, HubTensor, Layout
from bis_jax.models.model_config import ModelConfig
from bis_jax.models.processor import TOKENIZER_FILES
from bis_jax.storage import is_url

_SHOWN = 20  # problems of a checkpoint
ADAPTER_CONFIG = "adapter_config.json"  # of a folder of PEFT
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")


class WeightsError(UserError):
  """A checkpoint that cannot be read or does not fit the model; the message lists every reason."""

  def __init__(self, subject: str, problems: Sequence[str]):
    count = f" ({len(problems)} problems)" if len(problems) > 1 else ""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    super().__init__("\n  ".join([f"{subject}{count}:", *problems[:_SHOWN], *more]))


def load(
  folder: epath.Path,
  config: ModelConfig,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  *,
  yes_token: int,
  no_token: int,
  marker_token: int | None,
  marker_noise: float = 0.0,
  skip: Sequence[str] = (),
  overrides: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """Returns the parameters of a checkpoint; every process reads only the slices that it holds.

  The host holds one shard of one parameter at a time. Raises a WeightsError with all faults of
  files and keys if the checkpoint does not fit.

  Args:
    folder: from `find_checkpoint`.
    config: the checkpoint's must agree.
    shapes: by path, with shardings.
    yes_token, no_token: rows of the LM head that become the columns of the reward head.
    marker_token: step marker, whose embedding becomes the mean of the rows before it unless the
      checkpoint was trained with this marker. If it is the model's last row, the checkpoint may
      lack it. None: its row is read like any other.
    marker_noise: standard deviation of Gaussian noise added to a mean-initialized marker embedding,
      in units of the embedding table's standard deviation.
    skip: regexes of keys that the model does not have and that are not reported as unknown.
    overrides: parameters that replace the checkpoint's.
  """
  overrides = dict(overrides or {})
  stored, places = _checked_places(
    folder, config, shapes, (yes_token, no_token), marker_token, skip, overrides
  )
  head = places[REWARD_HEAD_PATH]
  read = {path: places[path] for path in shapes if path not in overrides}
  untrained = marker_token if is_new_marker(folder, marker_token) else None
  params = {}
  for path, struct in shapes.items():
    if path in overrides:
      params[path] = jax.device_put(overrides[path], struct.sharding)
      continue
    keys = [stored[key] for key in read[path].keys]
    read_in = by_rows(read[path], struct) if is_url(folder) else struct.sharding
    array = assemble(
      struct.update(sharding=read_in), functools.partial(read_parameter, read[path], keys)
    )
    params[path] = array
    if read_in != struct.sharding:
      params[path] = jax.jit(lambda x: x, out_shardings=struct.sharding)(array)
    if path == EMBEDDING_PATH and untrained is not None:
      # Before the other parameters take the memory that float32 rows need.
      params[path] = _with_mean_row(params[path], untrained, marker_noise)
      log.info("embedding of the new step marker (row %d): mean of the rows before", untrained)
  log.info(
    "read %s: %d parameters; reward head from rows %d and %d of %s; not read: %s",
    folder,
    sum(value.size for value in params.values()),
    yes_token,
    no_token,
    head.keys[0],
    ", ".join(sorted(stored.keys() - {key for place in read.values() for key in place.keys}))
    or "nothing",
  )
  return params


def is_new_marker(folder: epath.Path, token: int | None) -> bool:
  """Returns whether a checkpoint was not trained with this step marker, whose row is then a mean."""
  # An export names the marker that it was trained with; a published checkpoint names none.
  return token != read_config(folder)[0].get("step_marker_token_id")


def check(
  folder: epath.Path, config: ModelConfig, shapes: Mapping[str, Any], marker_token: int
) -> None:
  """Raises a WeightsError if `load` would; reads the headers of the files only."""
  _checked_places(folder, config, shapes, (0, 0), marker_token)


def _checked_places(
  folder: epath.Path,
  config: ModelConfig,
  shapes: Mapping[str, Any],
  head_rows: tuple[int, int],
  marker_token: int | None,
  skip: Sequence[str] = (),
  overrides: Container[str] = (),
) -> tuple[dict[str, StoredTensor], dict[str, HubTensor]]:
  """Returns a checkpoint's tensors by key, and the place of every parameter."""
  if (folder / ADAPTER_CONFIG).exists():
    raise UserError(
      f"{folder} holds adapters of PEFT and no whole model: merge them with "
      f"python -m bis_jax.export --workdir={folder} --out=FOLDER, and name that folder"
    )
  raw, problems = read_config(folder)
  layout = backbones.get(config.backbone).layout(config, raw)
  stored, damage = _read_headers(folder, layout)
  places = _places(layout, config, shapes, stored, head_rows, marker_token)
  wanted = {
    key: places[path].shape for path in shapes if path not in overrides for key in places[path].keys
  }
  if raw:
    problems += _config_differences(raw, config, rows=places[REWARD_HEAD_PATH].shape[0])
  problems += damage + differences(stored, wanted, (*skip, re.escape(layout.lm_head)))
  if problems:
    raise WeightsError(
      f"the checkpoint in {folder} does not fit the model: name another one, or its backbone and size",
      problems,
    )
  return stored, places


def _places(
  layout: Layout,
  config: ModelConfig,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  stored: Mapping[str, StoredTensor],
  head_rows: tuple[int, int],
  marker_token: int | None,
) -> dict[str, HubTensor]:
  """Returns the place of every parameter, and always of the reward head, in a checkpoint."""
  rows = config.text.vocab_size
  if marker_token == rows - 1 and layout.embedding in stored:  # the marker's row may be new
    rows = max(rows - 1, min(rows, stored[layout.embedding].shape[0]))
  table_shape = (rows, config.text.hidden_size)
  places = layout.tensors(shapes)
  if EMBEDDING_PATH in places:
    places[EMBEDDING_PATH] = dataclasses.replace(places[EMBEDDING_PATH], shape=table_shape)
  tied = config.tie_word_embeddings and layout.lm_head not in stored
  places[REWARD_HEAD_PATH] = HubTensor(
    keys=(layout.embedding if tied else layout.lm_head,),
    shape=table_shape,
    stacked=False,
    transposed=True,
    row_ranges=tuple((row, row + 1) for row in head_rows),
  )
  return places


def is_hub_id(name: str) -> bool:
  return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def find_checkpoint(name: str, *, tokenizer_alone: bool = False) -> epath.Path:
  """Returns the folder of a checkpoint given as a local folder or as a hub id ("Qwen/...").

  A hub id is read from the local cache, or downloaded, without the weights if `tokenizer_alone`. A
  name in a folder that exists here is probably a mistyped path: the hub is not asked for it.
  """
  folder = files.absolute(name)
  if folder.is_dir():
    return folder
  if not is_hub_id(name):
    raise FileNotFoundError(
      f"no folder {name}, and that is not a hub id (like Qwen/Qwen2.5-VL-7B-Instruct)"
    )
  patterns = [*TOKENIZER_FILES] if tokenizer_alone else ["*.safetensors", *TOKENIZER_FILES]
  include = " ".join(f"'{pattern}'" for pattern in patterns)
  here = folder.parent.is_dir()
  try:
    found = huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=here)
    return epath.Path(found)
  except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
    if here:
      raise FileNotFoundError(
        f"no folder {name} in {folder.parent}, which exists, so the hub was not asked for {name}: "
        f"correct the name, or run `hf download {name} --include {include}` first"
      ) from error
    raise FileNotFoundError(
      f"no folder {name}, and the hub could not be reached ({error}). On a machine with a network, "
      f"run `hf download {name} --include {include} --local-dir FOLDER` and name that folder"
    ) from error


def read_config(folder: epath.Path) -> tuple[dict[str, Any], list[str]]:
  """Returns a checkpoint's config.json, {} if it cannot be read, and its problems."""
  try:
    found = files.parse_json(files.json_bytes(folder / "config.json"))
  except (FileNotFoundError, NotADirectoryError):
    return {}, ["missing file: config.json"]
  except ValueError as error:
    return {}, [f"config.json: {error}"]
  return (found, []) if isinstance(found, dict) else ({}, ["config.json: not a JSON object"])


def _read_headers(folder: epath.Path, layout: Layout) -> tuple[dict[str, StoredTensor], list[str]]:
  """Returns the tensors of a checkpoint by canonical key, and the problems of its files."""
  remote_tensors.forget()
  problems, index, weight_map = [], folder / _INDEX, None
  if index.exists():
    try:
      weight_map = dict(files.parse_json(files.json_bytes(index))["weight_map"])
      if outside := [name for name in weight_map.values() if not files.is_below(name)]:
        raise ValueError(f"it names {outside[0]!r}, which is not in the folder")
    except (KeyError, TypeError, ValueError) as error:
      weight_map = None
      problems.append(f"corrupt file: {_INDEX} ({error}); download it again")
  names = set(weight_map.values() if weight_map else [p.name for p in folder.glob("*.safetensors")])
  if not names:
    raise WeightsError(
      f"no *.safetensors in {folder}",
      ["only safetensors are read: save it with Transformers' save_pretrained"],
    )
  tensors: dict[str, list[StoredTensor]] = collections.defaultdict(list)
  for name in sorted(names):
    file = folder / name
    try:
      with open_tensors(file) as opened:
        for key in opened.keys():  # noqa: SIM118  (not a dict)
          view = opened.get_slice(key)
          stored = StoredTensor(file, key, tuple(view.get_shape()), view.get_dtype())
          tensors[layout.canonical(key)].append(stored)
          if weight_map is not None and weight_map.get(key) != name:
            problems.append(f"not in the index: {key} of {name}")
    except FileNotFoundError:
      problems.append(f"missing file: {name}, named by {_INDEX}")
    except SafetensorError as error:
      problems.append(f"truncated or corrupt file: {name} ({error}); download it again")
  for key, found in tensors.items():
    if len(found) > 1:
      places = ", ".join(f"{t.key} of {t.file.name}" for t in found)
      problems.append(f"duplicate: {key} ({places})")
  return {key: found[0] for key, found in tensors.items()}, problems


def _config_differences(raw: dict[str, Any], config: ModelConfig, rows: int) -> list[str]:
  """Returns one line per field of config.json that differs; `rows` of the embedding table."""
  try:
    stored = type(config).from_hugging_face(raw)
  except KeyError as error:
    return [f"config.json lacks {error}"]
  except ValueError as error:
    return [f"config.json: {error}"]
  problems = []
  for part in ("text", "vision"):
    ours, theirs = (dataclasses.asdict(getattr(c, part)) for c in (config, stored))
    if part == "text":
      ours["vocab_size"] = rows
    problems += [
      f"{part} {field} is {theirs[field]}, the model has {ours[field]}"
      for field in ours
      if ours[field] != theirs[field]
    ]
  return problems


def differences(
  stored: Mapping[str, StoredTensor],
  wanted: Mapping[str, tuple[int, ...]],
  skip: Sequence[str] = (),
) -> list[str]:
  """Returns one line per key that is missing, unknown, or of a wrong shape or dtype."""
  problems = [f"missing: {key} {shape}" for key, shape in wanted.items() if key not in stored]
  for key, tensor in stored.items():
    if key not in wanted:
      if not any(re.search(pattern, key) for pattern in skip):
        problems.append(f"unknown: {tensor.key} of {tensor.file.name}")
      continue
    if tensor.shape != wanted[key]:
      problems.append(f"wrong shape: {tensor.key} is {tensor.shape}, the model has {wanted[key]}")
    if tensor.dtype not in _DTYPES:
      problems.append(f"wrong dtype: {tensor.key} is {tensor.dtype}, not one of {_DTYPES}")
  return problems


def _with_mean_row(table_VD: jax.Array, token: int, noise: float) -> jax.Array:
  def replace(table_VD: jax.Array) -> jax.Array:
    row_D = table_VD[:token].mean(axis=0, dtype=jnp.float32)
    if noise:
      spread_D = table_VD[:token].astype(jnp.float32).std(axis=0)
      row_D += noise * spread_D * jax.random.normal(jax.random.key(token), row_D.shape)
    return table_VD.at[token].set(row_D.astype(table_VD.dtype))

  return jax.jit(replace, donate_argnums=0, out_shardings=table_VD.sharding)(table_VD)


def save(
  folder: epath.Path,
  params: Mapping[str, jax.Array],
  config: ModelConfig,
  *,
  yes_token: int,
  no_token: int,
  base: epath.Path | None,
  dtype: str,
  tied: bool = False,
  max_file_bytes: int = 4 * 10**9,
) -> None:
  """Writes safetensors files with an index, in the layout of `base`, else of the config.json there.

  With the dtype of the files that were loaded, tensors that were not trained stay bit-equal.

  Args:
    folder: exists; its files are overwritten.
    params: by path, all on devices of this process.
    yes_token, no_token: rows of the LM head for the columns of the reward head.
    base: checkpoint with the other rows of the LM head; None: they are zero.
    dtype: of the tensors, "float32", "bfloat16" or "float16".
    tied: the other rows are those of the embedding table, not of `base`.
    max_file_bytes: maximum size of a file, unless its only tensor is larger.
  """
  layout = backbones.get(config.backbone).layout(config, read_config(base or folder)[0])
  parts: dict[str, list[tuple[jax.Array, HubTensor, int]]] = collections.defaultdict(list)
  for path, tensor in layout.tensors(params).items():
    for layer, key in enumerate(tensor.keys):
      parts[key].append((params[path], tensor, layer))
  tensors: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {
    key: (found[0][1].shape, functools.partial(_fused, found)) for key, found in parts.items()
  }
  shape = (config.text.vocab_size, config.text.hidden_size)

  def lm_head() -> np.ndarray:
    head_VD = np.zeros(shape, np.float32)
    if tied:
      head_VD = np.array(params[EMBEDDING_PATH], np.float32)
    elif base is not None:
      head_VD = _base_lm_head(base, shape, layout)
    head_VD[[yes_token, no_token]] = np.asarray(params[REWARD_HEAD_PATH]).T
    return head_VD

  tensors[layout.lm_head] = shape, lm_head

  groups: list[list[str]] = [[]]
  file_bytes = total = 0
  for key, (tensor_shape, _) in tensors.items():
    size = int(np.prod(tensor_shape)) * np.dtype(dtype).itemsize
    if groups[-1] and file_bytes + size > max_file_bytes:
      groups.append([])
      file_bytes = 0
    groups[-1].append(key)
    file_bytes, total = file_bytes + size, total + size
  weight_map = {}
  for number, keys in enumerate(groups, start=1):
    name = f"model-{number:05}-of-{len(groups):05}.safetensors"
    weight_map |= dict.fromkeys(keys, name)
    content = {key: np.ascontiguousarray(tensors[key][1]().astype(dtype)) for key in keys}
    with files.written_locally(folder) as local:
      safetensors.numpy.save_file(content, local / name, metadata={"format": "pt"})
  files.write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _fused(parts: Sequence[tuple[jax.Array, HubTensor, int]]) -> np.ndarray:
  out = np.empty(parts[0][1].shape, parts[0][0].dtype)
  for param, tensor, layer in parts:
    value = np.asarray(param[layer] if tensor.stacked else param)
    value = value.T if tensor.transposed else value
    ranges = tensor.row_ranges or ((0, len(out)),)
    rows = np.concatenate([np.arange(*row_range) for row_range in ranges])
    out[rows] = value.reshape(len(rows), *out.shape[1:])
  return out


def _base_lm_head(base: epath.Path, shape: tuple[int, int], layout: Layout) -> np.ndarray:
  """Returns the LM head of a checkpoint, float32[V, D]; a lacking last row is the mean of the others."""
  stored, problems = _read_headers(base, layout)
  if problems:
    raise WeightsError(f"the base checkpoint in {base} cannot be read", problems)
  tensor = stored.get(layout.lm_head) or stored[layout.embedding]
  if tensor.shape not in (shape, (shape[0] - 1, shape[1])):
    raise WeightsError(
      f"the base checkpoint in {base} does not fit the model",
      [f"{tensor.key} of {tensor.file} is {tensor.shape}, the model has {shape}"],
    )
  with open_tensors(tensor.file) as opened:
    head_VD = opened.get_slice(tensor.key)[:].astype(np.float32)
  if len(head_VD) < shape[0]:
    head_VD = np.concatenate([head_VD, head_VD.mean(axis=0, keepdims=True)])
  return head_VD
