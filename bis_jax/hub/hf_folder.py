"""A model as a Hugging Face folder: weights, config, tokenizer, image processor, model card."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import transformers
from etils import epath

from bis_jax import files
from bis_jax.hub import weights
from bis_jax.inputs.prompt import NEGATIVE, POSITIVE
from bis_jax.models import backbones
from bis_jax.models.backbone import Processor
from bis_jax.models.model_config import ModelConfig

VLLM = "vllm.yaml"


def write(
  out: epath.PathLike,
  params: Mapping[str, jax.Array],
  config: ModelConfig,
  processor: Processor,
  *,
  base: epath.Path | None,
  dtype: str,
  card: str,
  run: Mapping[str, Mapping[str, Any]] | None = None,
  tied: bool = False,
) -> None:
  """Writes a model as a folder in the layout of `base`, else in that of Transformers, if any.

  `out` must be new or empty (FileExistsError); `card` is the text of the model card, `run`
  {name: content} of a JSON file about the run. For the other arguments see `weights.save`.
  """
  out = require_empty(out)
  special = processor.prompt.special
  backbone = backbones.get(config.backbone)
  preprocessor = backbone.preprocessor_json(processor.images)
  with files.new_folder(out) as part:
    files.write_json(part / "config.json", hugging_face_config(config, processor, dtype, base))
    weights.save(
      part,
      params,
      config,
      yes_token=special.yes,
      no_token=special.no,
      base=base,
      dtype=dtype,
      tied=tied,
    )
    with files.written_locally(part) as local:
      write_tokenizer(local, processor.tokenizer)
      _add(local, backbone.serving_files(config, processor, _base_json(base)))
    files.write_json(part / "preprocessor_config.json", preprocessor)
    files.write_json(part / VLLM, _vllm(special.prm))
    for name, content in (run or {}).items():
      files.write_json(part / name, content)
    files.write_text(part / "README.md", card)


def require_empty(out: epath.PathLike) -> epath.Path:
  """Returns the folder; raises FileExistsError unless it is new or empty."""
  out = epath.Path(out)
  if out.exists() and any(out.iterdir()):
    raise FileExistsError(f"{out} is not empty: name a new or an empty folder, nothing was changed")
  return out


def write_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
  tokenizer.save_pretrained(folder)
  _rename_for_transformers_4(folder / "tokenizer_config.json")


def _add(folder: pathlib.Path, contents: Mapping[str, Any]) -> None:
  for name, content in contents.items():
    if isinstance(content, str):
      files.write_text(folder / name, content)
    else:
      held = files.read_json(folder / name, "") if (folder / name).exists() else {}
      files.write_json(folder / name, held | content)


def _vllm(marker: int) -> dict[str, Any]:
  # Flags of `vllm serve FOLDER --config FOLDER/vllm.yaml`; JSON is YAML.
  pooler = {"task": "token_classify", "pooling_type": "STEP", "step_tag_id": marker}
  return {"runner": "pooling", "convert": "classify", "pooler-config": pooler}


def _rename_for_transformers_4(file: pathlib.Path) -> None:
  # Of what Transformers 5 writes, 4.57 refuses these two; 5 reads either spelling.
  content = json.loads(file.read_text())
  if content.get("tokenizer_class") == "TokenizersBackend":
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
  if isinstance(content.get("extra_special_tokens"), list):
    content["additional_special_tokens"] = content.pop("extra_special_tokens")
  files.write_json(file, content)


def hugging_face_config(
  config: ModelConfig, processor: Processor, dtype: str, base: epath.Path | None = None
) -> dict[str, Any]:
  content = backbones.get(config.backbone).config_json(config, processor, _base_json(base))
  # vLLM makes a classifier of tokens from two rows of the LM head.
  content["text_config" if "text_config" in content else "llm_config"] |= {
    "method": "no_post_processing",
    "classifier_from_token": [POSITIVE, NEGATIVE],
    "tie_word_embeddings": False,
  }
  return content | {
    "tie_word_embeddings": False,  # the rows of `Yes` and `No` differ from the embedding's
    "dtype": dtype,
    "transformers_version": transformers.__version__,  # without it 4.57 warns of a wrong tokenizer
    "step_marker_token_id": processor.prompt.special.prm,  # read back by `weights.load`
  }


def is_plain(config: ModelConfig, base: epath.Path | None) -> bool:
  """Returns whether Transformers loads the folder without code of the checkpoint."""
  return backbones.get(config.backbone).is_plain(config, _base_json(base))


def _base_json(base: epath.Path | None) -> dict[str, Any]:
  raw, problems = weights.read_config(base) if base else ({}, [])
  if problems:
    raise weights.WeightsError(f"the base checkpoint in {base} cannot be read", problems)
  return raw
