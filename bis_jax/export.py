"""The command that writes a run's newest checkpoint as a Hugging Face folder.

    python -m bis_jax.export --workdir=runs/qwen_bis10 --out=exported
    python -m bis_jax.export --workdir=runs/qwen_bis10 --out=exported --dtype=float32 --base=

Plain Transformers loads the folder: safetensors, config, tokenizer with the step marker, image
processor, and a model card with the recipe, the manifest's digest, the evaluation and an example.
The reward head is two rows of its LM head, those of `Yes` and `No`; the other rows are those of the
checkpoint that the training started from.
"""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags
from etils import epath
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bis_jax.inputs.images import QwenImages
from bis_jax.inputs.prompt import special_tokens
from bis_jax.model_card import model_card
from bis_jax.models import weights
from bis_jax.models.qwen2_5_vl import Qwen2_5_VLConfig
from bis_jax.restored import restore

_WORKDIR = flags.DEFINE_string("workdir", "", "of a run of bis_jax.main")
_OUT = flags.DEFINE_string("out", "", "folder to write: new or empty")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["float32", "bfloat16", "float16"], "of the tensors"
)
_BASE = flags.DEFINE_string(
  "base",
  None,
  "checkpoint whose LM head has the other rows; default: the run's; empty: leave them zero",
)


def export(
  out: pathlib.Path,
  params: Mapping[str, jax.Array],
  config: Qwen2_5_VLConfig,
  tokenizer: PreTrainedTokenizerBase,
  images: QwenImages,
  *,
  base: pathlib.Path | None,
  dtype: str,
  card: str,
) -> None:
  """Writes a model as a folder that plain Transformers loads.

  Args:
    out: a folder that does not exist or is empty.
    params: every parameter by path, on devices of this process.
    config: the model's.
    tokenizer: with the step marker.
    images: the pixel limits that the model was trained with.
    base: checkpoint whose LM head has the rows other than `Yes` and `No`; None: they are zero.
    dtype: of the tensors, "float32", "bfloat16" or "float16".
    card: text of the model card.

  Raises:
    FileExistsError: `out` holds files.
  """
  if out.exists() and any(out.iterdir()):
    raise FileExistsError(f"{out} holds files: name a new or an empty folder, nothing was changed")
  out.mkdir(parents=True, exist_ok=True)
  special = special_tokens(tokenizer)
  weights.save(
    out,
    params,
    config,
    yes_token=special.yes,
    no_token=special.no,
    base=base,
    dtype=dtype,
  )
  tokenizer.save_pretrained(out)
  processor = Qwen2VLImageProcessorPil(min_pixels=images.min_pixels, max_pixels=images.max_pixels)
  processor_class = {"processor_class": "Qwen2_5_VLProcessor"}
  _write_json(out / "preprocessor_config.json", processor.to_dict() | processor_class)
  _write_json(out / "config.json", hugging_face_config(config, tokenizer, dtype))
  (out / "README.md").write_text(card, encoding="utf-8")


def hugging_face_config(
  config: Qwen2_5_VLConfig, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> dict[str, Any]:
  """Returns the content of config.json.

  The LM head is never tied, because its two reward rows are trained apart from the embedding.
  """
  special = special_tokens(tokenizer)
  content = config.to_hugging_face() | {
    "tie_word_embeddings": False,
    "dtype": dtype,
    "image_token_id": special.image_pad,
    "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    "vision_start_token_id": special.vision_start,
    "vision_end_token_id": special.vision_end,
    "step_marker_token_id": special.prm,  # read back by `weights.load`; Transformers keeps it
  }
  content["text_config"] |= {
    "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
  }
  return content


def _write_json(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
  """Exports; bad input ends it with a message and exit code 1, and nothing is written over."""
  if len(argv) > 1:
    sys.exit(f"export: what is {argv[1]!r}? Every argument is a flag, like --out=FOLDER")
  if not _WORKDIR.value or not _OUT.value:
    sys.exit("export: say with --workdir=... and --out=... what to write where")
  try:
    export_run(_WORKDIR.value, pathlib.Path(_OUT.value), _DTYPE.value, _BASE.value)
  except (ValueError, OSError) as error:
    sys.exit(f"export: {error}")


def export_run(workdir: str, out: pathlib.Path, dtype: str, base: str | None) -> None:
  """Writes the newest checkpoint of a run's workdir; see `export`.

  Args:
    workdir: of a run of `bis_jax.main`, local or gs://.
    out: folder to write.
    dtype: of the tensors.
    base: folder or hub id of the checkpoint with the LM head's other rows; "": they are zero;
      None: the checkpoint that the run started from.
  """
  run = restore(workdir, {"data": 1, "fsdp": -1, "tensor": 1})  # whatever the run's machine was
  place = epath.Path(workdir)
  base = run.config.model.checkpoint if base is None else base
  evaluation = place / "evaluation.json"
  card = model_card(
    run=run.config.to_dict(),
    manifest=json.loads((place / "manifest.json").read_text()),
    evaluation=json.loads(evaluation.read_text()) if evaluation.exists() else None,
    step=run.step,
    other_rows="those of the checkpoint it started from" if base else "zero",
  )
  images = QwenImages(run.config.inputs.min_pixels, run.config.inputs.max_pixels)
  folder = weights.find_checkpoint(base) if base else None
  export(out, run.params, run.model, run.tokenizer, images, base=folder, dtype=dtype, card=card)
  print(f"wrote step {run.step} of {workdir} to {out} in {dtype}")


if __name__ == "__main__":
  app.run(main)
