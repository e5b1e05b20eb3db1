"""Hugging Face weights in and out: safetensors streamed into the shards of our parameters and back.

`bis_jax.models.hub_layout` says which tensors make up which parameter. Nothing but safetensors is
read: no pickle and no code from a checkpoint.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches numpy, and with it safetensors, bfloat16)
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from bis_jax.console import log
from bis_jax.errors import UserError
from bis_jax.hub.tensor_reader import HeadReader, ParameterReader, StoredTensor, assemble
from bis_jax.models import backbones
from bis_jax.models.hub_layout import EMBEDDING_PATH, REWARD_HEAD_PATH, HubTensor, Layout
from bis_jax.models.model_config import ModelConfig

_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")
_TOKENIZER_FILES = ("*.json", "*.txt", "*.jinja", "*.model")  # the last is SentencePiece's
_HUB_FILES = ("*.safetensors", *_TOKENIZER_FILES)


class WeightsError(UserError):
  """A checkpoint that cannot be read or does not fit the model; the message lists every reason."""


def load(
  folder: pathlib.Path,
  config: ModelConfig,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  *,
  yes_token: int,
  no_token: int,
  marker_token: int | None,
  marker_noise: float = 0.0,
  skip: Sequence[str] = (),
  initialised: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """Returns the parameters of a checkpoint, each process reading only the slices it holds.

  The host holds one shard of one parameter at a time above the arrays themselves.

  Args:
    folder: from `find_checkpoint`.
    config: the model's; its architecture must be the checkpoint's.
    shapes: shape, dtype and sharding of every parameter, by path.
    yes_token: row of the LM head that becomes the column of positive steps.
    no_token: row of the LM head that becomes the other column.
    marker_token: step marker. Its row becomes the mean of the rows before it, unless the checkpoint
      says (`step_marker_token_id` in config.json, which `bis_jax.export` writes) that it was trained
      with this marker. None leaves the row as it is. If it is the model's last row, the checkpoint
      may do without it.
    marker_noise: of a row that becomes the mean: normal noise is added to it, so many standard
      deviations of the rows before it strong.
    skip: regexes of keys in the file that are not read although no parameter wants them.
    initialised: parameters that are taken from here and not from the file.

  Raises:
    WeightsError: with every unknown, missing, duplicate, wrong-shape or wrong-dtype key, and every
      truncated or corrupt file, in one message.
  """
  initialised = dict(initialised or {})
  layout = _layout(folder, config)
  table = {path: t for path, t in layout.tensors(shapes).items() if path not in initialised}
  stored, damage = read_headers(folder, layout)
  tied = config.tie_word_embeddings and layout.lm_head not in stored
  head = layout.embedding if tied else layout.lm_head
  wanted = {key: tensor.shape for tensor in table.values() for key in tensor.keys}
  rows = config.text.vocab_size
  if marker_token == rows - 1 and layout.embedding in stored:  # the marker's may be a new row
    rows = max(rows - 1, min(rows, stored[layout.embedding].shape[0]))
  if layout.embedding in wanted:
    wanted[layout.embedding] = (rows, config.text.hidden_size)
  if REWARD_HEAD_PATH not in initialised:
    wanted[head] = (rows, config.text.hidden_size)
  problems = _architecture_differences(folder, config, rows)
  problems += damage + _differences(stored, wanted, (*skip, re.escape(layout.lm_head)))
  if problems:
    raise WeightsError(
      f"the checkpoint in {folder} does not fit the model ({len(problems)} problems):\n  "
      + "\n  ".join(problems)
    )

  untrained_marker = marker_token is not None and marker_token != _trained_marker(folder)
  params = {}
  for path, struct in shapes.items():
    if path in initialised:
      params[path] = jax.device_put(initialised[path], struct.sharding)
    elif path == REWARD_HEAD_PATH:
      params[path] = assemble(struct, HeadReader(stored[head], (yes_token, no_token)))
    else:
      keys = [stored[key] for key in table[path].keys]
      params[path] = assemble(struct, ParameterReader(table[path], keys))
    if path == EMBEDDING_PATH and untrained_marker:  # now, while there is memory for float32 rows
      params[path] = _with_mean_row(params[path], marker_token, marker_noise)
  log.info(
    "read %s: %d parameters; reward head from rows %d and %d of %s%s; not read: %s",
    folder,
    sum(value.size for value in params.values()),
    yes_token,
    no_token,
    head,
    f"; row {marker_token} of {layout.embedding} is the mean of those before it"
    if untrained_marker
    else "",
    ", ".join(sorted(stored.keys() - wanted.keys())) or "nothing",
  )
  return params


def _layout(folder: pathlib.Path, config: ModelConfig) -> Layout:
  """Returns how the checkpoint in a folder names its tensors."""
  file = folder / "config.json"
  try:
    checkpoint = json.loads(file.read_text()) if file.exists() else {}
  except ValueError:  # reported with all other problems
    checkpoint = {}
  return backbones.get(config.backbone).layout(config, checkpoint)


def _trained_marker(folder: pathlib.Path) -> int | None:
  """Returns the step marker that a checkpoint was trained with; None for a published one."""
  return json.loads((folder / "config.json").read_text()).get("step_marker_token_id")


def is_hub_id(name: str) -> bool:
  """Returns whether a name can be a hub id, like Qwen/Qwen2.5-VL-7B-Instruct."""
  return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "~"))


def find_checkpoint(name: str, *, tokenizer_alone: bool = False) -> pathlib.Path:
  """Returns the folder of a checkpoint given as a local folder or as a hub id ("Qwen/...").

  A hub id is taken from the local cache, or fetched when the network allows.

  Args:
    name: the folder or the hub id.
    tokenizer_alone: do without the weights.

  Raises:
    FileNotFoundError: neither is here; the message has the command to run where there is a network.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return folder
  if not is_hub_id(name):
    raise FileNotFoundError(
      f"no folder {name}, and that is no hub id (like Qwen/Qwen2.5-VL-7B-Instruct)"
    )
  files = _TOKENIZER_FILES if tokenizer_alone else _HUB_FILES
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
  except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
    include = " ".join(f"'{pattern}'" for pattern in files)
    raise FileNotFoundError(
      f"no folder {name}, and the hub could not be reached ({error}). Where there is a network, "
      f"run `hf download {name} --include {include} --local-dir FOLDER` and name that folder"
    ) from error


def read_headers(folder: pathlib.Path, layout: Layout) -> tuple[dict[str, StoredTensor], list[str]]:
  """Returns the tensors of a checkpoint by canonical key, and what is wrong with its files.

  Raises:
    WeightsError: the folder holds no safetensors.
  """
  index = folder / _INDEX
  weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else None
  names = sorted(
    set(weight_map.values()) if weight_map else (p.name for p in folder.glob("*.safetensors"))
  )
  if not names:
    raise WeightsError(
      f"no *.safetensors in {folder}: only safetensors are read; save the checkpoint with "
      "Transformers' save_pretrained(..., safe_serialization=True)"
    )
  tensors: dict[str, list[StoredTensor]] = collections.defaultdict(list)
  problems = []
  for name in names:
    file = folder / name
    try:
      with safe_open(file, framework="numpy") as opened:
        for key in opened.keys():  # noqa: SIM118  (not a dict)
          view = opened.get_slice(key)
          stored = StoredTensor(file, key, tuple(view.get_shape()), view.get_dtype())
          tensors[layout.canonical(key)].append(stored)
          if weight_map is not None and weight_map.get(key) != name:
            problems.append(f"not in the index: {key} of {name}")
    except FileNotFoundError:
      problems.append(f"missing file: {name}, named by {index.name}")
    except SafetensorError as error:
      problems.append(f"truncated or corrupt file: {name} ({error}); fetch it again")
  for key, found in tensors.items():
    if len(found) > 1:
      places = ", ".join(f"{t.key} of {t.file.name}" for t in found)
      problems.append(f"duplicate: {key} ({places})")
  return {key: found[0] for key, found in tensors.items()}, problems


def _architecture_differences(folder: pathlib.Path, config: ModelConfig, rows: int) -> list[str]:
  """Returns one line for each field of `config.json` that shapes cannot tell and that differs.

  Args:
    rows: of the embedding table that the file must have.
  """
  file = folder / "config.json"
  if not file.exists():
    return [f"missing file: {file.name}"]
  try:
    stored = type(config).from_hugging_face(json.loads(file.read_text()))
  except (KeyError, ValueError) as error:
    return [f"{file.name}: {error}"]
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


def _differences(
  stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]], skip: Sequence[str]
) -> list[str]:
  """Returns one line for each key that is missing, unknown, or of a wrong shape or dtype."""
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
  """Returns the table with row `token` replaced by the mean of the rows before it, and noise."""

  def replace(table_VD: jax.Array) -> jax.Array:
    row_D = table_VD[:token].mean(axis=0, dtype=jnp.float32)
    if noise:
      spread_D = table_VD[:token].astype(jnp.float32).std(axis=0)
      row_D += noise * spread_D * jax.random.normal(jax.random.key(token), row_D.shape)
    return table_VD.at[token].set(row_D.astype(table_VD.dtype))

  return jax.jit(replace, donate_argnums=0, out_shardings=table_VD.sharding)(table_VD)


def save(
  folder: pathlib.Path,
  params: Mapping[str, jax.Array],
  config: ModelConfig,
  *,
  yes_token: int,
  no_token: int,
  base: pathlib.Path | None,
  dtype: str,
  tied: bool = False,
  max_file_bytes: int = 4 * 10**9,
) -> None:
  """Writes the parameters as safetensors files with an index, in the layout of `base`, or else of
  the folder's config.json.

  The columns of the reward head become rows of the LM head; its other rows are those of `base`.
  With the dtype of the files that were loaded, tensors that were not trained come out bit for bit.

  Args:
    folder: exists; its files are written over.
    params: by path, all on devices of this process.
    config: the model's.
    yes_token: row of the LM head for the column of positive steps.
    no_token: row for the other column.
    base: checkpoint that the training started from; None leaves the other rows zero.
    dtype: of the tensors, "float32", "bfloat16" or "float16".
    tied: the other rows are those of the embedding table, and `base` is not read.
    max_file_bytes: a file takes tensors up to this size, and at least one.
  """
  layout = _layout(base or folder, config)
  parts: dict[str, list[tuple[jax.Array, HubTensor, int]]] = collections.defaultdict(list)
  for path, tensor in layout.tensors(params).items():
    for layer, key in enumerate(tensor.keys):
      parts[key].append((params[path], tensor, layer))
  tensors: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {
    key: (found[0][1].shape, functools.partial(_for_hub, found)) for key, found in parts.items()
  }
  columns = params[REWARD_HEAD_PATH], (yes_token, no_token)
  shape = (config.text.vocab_size, config.text.hidden_size)
  other_rows = params[EMBEDDING_PATH] if tied else base
  lm_head = functools.partial(_lm_head, *columns, other_rows, shape, layout)
  tensors[layout.lm_head] = shape, lm_head

  files: list[list[str]] = [[]]
  file_bytes = total = 0
  for key, (shape, _) in tensors.items():
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if files[-1] and file_bytes + size > max_file_bytes:
      files.append([])
      file_bytes = 0
    files[-1].append(key)
    file_bytes, total = file_bytes + size, total + size
  weight_map = {}
  for number, keys in enumerate(files, start=1):
    name = f"model-{number:05}-of-{len(files):05}.safetensors"
    weight_map |= dict.fromkeys(keys, name)
    content = {key: np.ascontiguousarray(tensors[key][1]().astype(dtype)) for key in keys}
    safetensors.numpy.save_file(content, folder / name, metadata={"format": "pt"})
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _for_hub(parts: Sequence[tuple[jax.Array, HubTensor, int]]) -> np.ndarray:
  """Returns one tensor as the hub's files hold it, from (parameter, its place, layer) of its parts."""
  values = []
  for param, tensor, layer in parts:
    value = np.asarray(param[layer] if tensor.stacked else param)
    values.append(value.T if tensor.transposed else value)
  tensor = parts[0][1]
  if tensor.row_ranges is None:
    return values[0].reshape(tensor.shape)
  fused = np.empty(tensor.shape, values[0].dtype)
  for value, (_, tensor, _) in zip(values, parts, strict=True):
    fused[np.concatenate([np.arange(*run) for run in tensor.row_ranges])] = value
  return fused


def _lm_head(
  columns_D2: jax.Array,
  rows: tuple[int, int],
  base: pathlib.Path | jax.Array | None,
  shape: tuple[int, int],
  layout: Layout,
) -> np.ndarray:
  """Returns the LM head [V, D] of a checkpoint, an array, or zeros, with the columns as rows.

  A row that the checkpoint lacks is the mean of the others.
  """
  if base is None:
    head_VD = np.zeros(shape, np.float32)
  elif isinstance(base, jax.Array):
    head_VD = np.array(base, np.float32)
  else:
    stored, problems = read_headers(base, layout)
    if problems:
      raise WeightsError(
        f"the base checkpoint in {base} cannot be read:\n  " + "\n  ".join(problems)
      )
    tensor = stored.get(layout.lm_head) or stored[layout.embedding]
    if tensor.shape not in (shape, (shape[0] - 1, shape[1])):
      raise WeightsError(f"{tensor.key} of {tensor.file} is {tensor.shape}, the model has {shape}")
    with safe_open(tensor.file, framework="numpy") as opened:
      head_VD = opened.get_tensor(tensor.key).astype(np.float32)
    if len(head_VD) < shape[0]:
      head_VD = np.concatenate([head_VD, head_VD.mean(axis=0, keepdims=True)])
  head_VD[list(rows)] = np.asarray(columns_D2).T
  return head_VD
