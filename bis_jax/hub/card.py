"""The model card of an exported folder: recipe, evaluation and an example for Transformers.

`templates/model_card.md` is the frame; `models/BACKBONE/card.md` fills in the backbone's own parts.
"""

import inspect
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from bis_jax import images
from bis_jax.inputs import texts
from bis_jax.models import backbones
from bis_jax.models.backbone import Processor

_MEASURES = ("overall_source_weighted", "macro_f1_pooled", "f1_correct", "f1_error", "roc_auc")
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
) -> str:
  """Returns the card, Markdown after a YAML header.

  `run`, `manifest` and `evaluation` are those JSON files of the workdir. `other_rows` is the origin
  of the LM head's rows other than `Yes` and `No`; `plain`: Transformers loads it without other
  code.
  """
  return TEMPLATES.get_template(backbones.get(run["model"]["backbone"]).card).render(
    run=run,
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
