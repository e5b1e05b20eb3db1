"""The model card of an exported folder: recipe, evaluation and an example for Transformers.

`templates/model_card.md` is the frame; `models/BACKBONE/card.md` fills in the backbone's own parts.
"""

import inspect
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from bis_jax import files, images
from bis_jax.hub.weights import is_hub_id
from bis_jax.inputs import texts
from bis_jax.models import backbones
from bis_jax.models.backbone import Processor
from bis_jax.models.model_config import LORA

_MEASURES = ("overall_source_weighted", "macro_f1_pooled", "f1_correct", "f1_error", "roc_auc")
_CORPUS, _BENCHMARK = "OpenGVLab/VisualPRM400K-v1.1-Raw", "OpenGVLab/VisualProcessBench"
# Licences that cards on the hub state; of other checkpoints the card refers to theirs.
_LICENSES = {"Qwen/Qwen2.5-VL-7B-Instruct": "apache-2.0", "OpenGVLab/InternVL2_5-8B": "mit"}
_TRIED = "4.57.6 and 5.24.0"  # by benchmarks/export_transformers.py
# Of the example: the same functions as in training.
_FUNCTIONS = "\n\n".join(
  [
    f"IMAGE_PLACEHOLDER = {texts.IMAGE_PLACEHOLDER}\n",
    *map(inspect.getsource, (texts.question_text, images.upright_rgb)),
  ]
).strip()
_HUB = pathlib.Path(__file__).parent

TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader([_HUB / "templates", _HUB.parent / "models"]),
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
  keep_trailing_newline=True,
)
TEMPLATES.filters |= {
  "number": "{:g}".format,
  "percent": "{:.0%}".format,
  "thousands": "{:,}".format,
  "literal": lambda text: json.dumps(text, ensure_ascii=False),  # of Python
}


def model_card(
  *,
  run: Mapping[str, Any],
  processor: Processor,
  manifest: Mapping[str, Any],
  evaluation: Mapping[str, Any] | None,
  step: int,
  other_rows: str,
  plain: bool = True,
  name: str = "process reward model",
  license: str | None = None,
  adapter_of: str = "",
) -> str:
  """Returns the card, Markdown after a YAML header with the hub's metadata.

  `run`, `manifest` and `evaluation` are those JSON files of the workdir. `other_rows` is the origin
  of the LM head's rows other than `Yes` and `No`; `plain`: Transformers loads it without other
  code. `license` is an identifier of the hub; None: that of the initial checkpoint. `adapter_of` is the
  base of a PEFT folder.
  """
  return TEMPLATES.get_template(backbones.get(run["model"]["backbone"]).card).render(
    run=run,
    metadata=_metadata(run, evaluation, name, license, adapter_of).to_yaml(),
    adapter_of=adapter_of,
    adapters=", ".join(
      f"`{rule[0]}`" for rule in run["model"]["learning_rates"] if rule[1] == LORA
    ),
    prompt=processor.prompt,
    images=processor.images,
    manifest=manifest,
    evaluation=evaluation,
    step=step,
    other_rows=other_rows,
    plain=plain,
    measures=_MEASURES,
    functions=_FUNCTIONS,
    tried=_TRIED,
  )


def hub_id_of_base(checkpoint: str) -> str | None:
  """Returns config.model.checkpoint if it is a hub id, None for a folder or none at all."""
  return checkpoint if is_hub_id(checkpoint) and not files.absolute(checkpoint).exists() else None


def _metadata(
  run: Mapping[str, Any],
  evaluation: Mapping[str, Any] | None,
  name: str,
  license: str | None,
  adapter_of: str = "",
) -> ModelCardData:
  base = hub_id_of_base(run["model"]["checkpoint"])
  toy = run["corpus"]["name"] == "toy"
  relation = "adapter" if adapter_of else "finetune"
  more: dict[str, Any] = {"base_model": base, "base_model_relation": relation} if base else {}
  if not toy:
    more["datasets"] = [_CORPUS]
  license = license or _LICENSES.get(base or "")
  if not license:
    license, more["license_name"] = "other", "as-the-base-model" if base else "not-stated"
    if base:
      more["license_link"] = f"https://huggingface.co/{base}"
  return ModelCardData(
    license=license,
    language="en",
    library_name="peft" if adapter_of else "transformers",
    pipeline_tag="image-text-to-text",
    tags=["prm", "process-reward-model", "multimodal", "bis_jax"],
    model_name=name,
    eval_results=_results(evaluation, toy) or None,
    **more,
  )


def _results(evaluation: Mapping[str, Any] | None, toy: bool) -> list[EvalResult]:
  """Returns a result per threshold and measure, which names where the threshold is from."""
  blocks = evaluation["thresholds"] if evaluation else {}
  return [
    EvalResult(
      task_type="image-text-to-text",
      task_name="correctness of the steps of solutions",
      dataset_type="toy" if toy else _BENCHMARK,
      dataset_name="toy benchmark of bis_jax" if toy else "VisualProcessBench",
      dataset_split="test",
      metric_type="roc_auc" if measure == "roc_auc" else "f1",
      metric_name=f"{measure}, threshold {block['threshold']:.4f} {origin}",
      metric_value=round(100 * block[measure], 2),
      metric_args={"threshold": block["threshold"], "origin": block.get("origin", origin)},
    )
    for origin, block in blocks.items()
    for measure in _MEASURES
    if block.get(measure) is not None
  ]
