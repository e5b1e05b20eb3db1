"""A model as a Hugging Face folder: weights, config, tokenizer, image processor, model card."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from bis_jax.hub import weights
from bis_jax.models import backbones
from bis_jax.models.backbone import Processor
from bis_jax.models.model_config import ModelConfig


def write(
  out: pathlib.Path,
  params: Mapping[str, jax.Array],
  config: ModelConfig,
  processor: Processor,
  *,
  base: pathlib.Path | None,
  dtype: str,
  card: str,
  tied: bool = False,
) -> None:
  """Writes a model as a folder in the layout of `base`.

  Without a base the layout is one that plain Transformers loads, where there is one: InternVL with
  InternLM2.5 inside has only the release's, whose code loads it.

  Args:
    out: a folder that does not exist or is empty.
    params: every parameter by path, on devices of this process.
    config: the model's.
    processor: of text and images, as the model was trained with.
    base: checkpoint whose LM head has the rows other than `Yes` and `No`; None: they are zero.
    dtype: of the tensors, "float32", "bfloat16" or "float16".
    card: text of the model card.
    tied: the rows other than `Yes` and `No` are those of the embedding table.

  Raises:
    FileExistsError: `out` holds files.
  """
  if out.exists() and any(out.iterdir()):
    raise FileExistsError(f"{out} holds files: name a new or an empty folder, nothing was changed")
  out.mkdir(parents=True, exist_ok=True)
  _write_json(out / "config.json", hugging_face_config(config, processor, dtype, base))
  special = processor.prompt.special
  weights.save(
    out,
    params,
    config,
    yes_token=special.yes,
    no_token=special.no,
    base=base,
    dtype=dtype,
    tied=tied,
  )
  processor.tokenizer.save_pretrained(out)
  preprocessor = backbones.get(config.backbone).preprocessor_json(processor.images)
  _write_json(out / "preprocessor_config.json", preprocessor)
  (out / "README.md").write_text(card, encoding="utf-8")


def hugging_face_config(
  config: ModelConfig, processor: Processor, dtype: str, base: pathlib.Path | None = None
) -> dict[str, Any]:
  """Returns the content of config.json.

  The LM head is never tied, because its two reward rows are apart from the embedding.
  """
  content = backbones.get(config.backbone).config_json(config, processor, _base_json(base))
  return content | {
    "tie_word_embeddings": False,
    "dtype": dtype,
    "step_marker_token_id": processor.prompt.special.prm,  # read back by `weights.load`
  }


def is_plain(config: ModelConfig, base: pathlib.Path | None) -> bool:
  """Returns whether Transformers loads the folder without code of the checkpoint."""
  return backbones.get(config.backbone).is_plain(config, _base_json(base))


def _base_json(base: pathlib.Path | None) -> dict[str, Any]:
  return json.loads((base / "config.json").read_text()) if base else {}


def _write_json(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
