"""The model card of an exported folder: what it is, how it was trained, how well it does, its use."""

import json
from collections.abc import Mapping
from typing import Any

from bis_jax.inputs.internvl_prompt import SYSTEM

# Scores steps with plain Transformers. The README and the tests run these very lines.
EXAMPLE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).requires_grad_(False)
tokenizer = AutoTokenizer.from_pretrained(folder)
images = AutoImageProcessor.from_pretrained(folder)([Image.open(image)], return_tensors="pt")
user = [{"type": "image"}, {"type": "text", "text": f"Question: {question}"}]
process = "Process: " + "\\n\\n".join(step + "<prm>" for step in steps)
messages = [{"role": "user", "content": user}, {"role": "assistant", "content": process}]
text = tokenizer.apply_chat_template(messages, tokenize=False)
text = text.replace("<|image_pad|>", "<|image_pad|>" * int(images["image_grid_thw"].prod() // 4))
ids = tokenizer(text, return_tensors="pt")["input_ids"]
pad, prm, yes, no = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<prm>", "Yes", "No"])
logits = model(input_ids=ids, mm_token_type_ids=(ids == pad).int(), **images).logits
scores = logits[0, ids[0] == prm][:, [yes, no]].float().softmax(dim=-1)[:, 0]
"""

# The same for InternVL3, in Transformers' own layout.
INTERNVL_EXAMPLE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration

model = InternVLForConditionalGeneration.from_pretrained(folder).requires_grad_(False)
tokenizer = AutoTokenizer.from_pretrained(folder)
picture = Image.open(image).convert("RGB")
tiles = AutoImageProcessor.from_pretrained(folder)([picture], return_tensors="pt")["pixel_values"]
system = SYSTEM
start, end = "<|im_start|>", "<|im_end|>\\n"
text = f"{start}system\\n{system}{end}{start}user\\n{end}{start}assistant\\n"
text += f"<img>{'<IMG_CONTEXT>' * (len(tiles) * model.config.image_seq_length)}</img>\\n"
text += f"Question: {question}\\nProcess: " + "\\n\\n".join(step + "<prm>" for step in steps)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
prm, yes, no = tokenizer.convert_tokens_to_ids(["<prm>", "Yes", "No"])
logits = model(input_ids=ids, pixel_values=tiles).logits
scores = logits[0, ids[0] == prm][:, [yes, no]].float().softmax(dim=-1)[:, 0]
"""

_WITH_CODE = """\
The folder has the layout of the InternVL release. Transformers loads it with the release's code:
copy the `*.py` files of the checkpoint that it started from into the folder, and say
`trust_remote_code=True`. bis_jax needs neither: `python -m bis_jax.score` reads the workdir.
"""

_MEASURES = ("overall_source_weighted", "macro_f1_pooled", "f1_correct", "f1_error", "roc_auc")


_SCOPES = {"per_source": "of every source", "global": "of all rollouts together"}
_LABELS = {
  "hard": "correct where the MC score is above {tau:g}",
  "soft": "the MC score",
  "banded": "correct where the MC score is above {band_high:g}, wrong at or below {band_low:g}",
  "truth": "the truth, which the embedded corpus knows",
}


def model_card(
  *,
  run: Mapping[str, Any],
  manifest: Mapping[str, Any],
  evaluation: Mapping[str, Any] | None,
  step: int,
  other_rows: str,
  plain: bool = True,
) -> str:
  """Returns the text of the card, Markdown behind a YAML head.

  Args:
    run: the run's config.json.
    manifest: the head of the run's manifest.json: digest, strategy, fraction, scope, alpha,
      none_positive, seed, rollouts.
    evaluation: the run's evaluation.json; None if it was not evaluated.
    step: training steps of this checkpoint.
    other_rows: where the LM head's rows beside `Yes` and `No` come from.
    plain: whether plain Transformers loads the folder.
  """
  optim, train = run["optim"], run["train"]
  recipe = {
    "selection": f"{manifest['strategy']}, fraction {manifest['fraction']} "
    f"{_SCOPES[manifest['scope']]}, alpha {manifest['alpha']}, R {manifest['none_positive']:g} without "
    f"a positive step, seed {manifest['seed']}: {manifest['rollouts']:,} rollouts",
    "manifest digest": f"`{manifest['digest']}`",
    "started from": run["model"]["checkpoint"] or "random weights",
    "labels": _LABELS[run["labels"]["kind"]].format(tau=run["corpus"]["tau"], **run["labels"]),
    "optimiser": f"AdamW, learning rate {optim['learning_rate']:g} (cosine, warm-up "
    f"{optim['warmup']:.0%}), weight decay {optim['weight_decay']:g}, clipped at {optim['clip']:g}",
    "batch": f"about {train['global_batch']} rollouts, {train['epochs']} epochs, {step} steps",
    "images": _images(run),
  }
  lines = [
    "---",
    "library_name: transformers",
    "pipeline_tag: image-text-to-text",
    "tags: [process-reward-model, multimodal]",
    "---",
    "",
    "# A multimodal process reward model",
    "",
    "Gives every step of a solution the probability that it is correct, read at the step marker",
    "`<prm>` that follows the step: softmax over the logits of `Yes` and `No`. Trained with bis_jax",
    "after arXiv 2602.04145. The other rows of the LM head are " + other_rows + ".",
    "",
    "## Recipe",
    "",
    "| | |",
    "|---|---|",
    *(f"| {name} | {value} |" for name, value in recipe.items()),
    "",
    "## Evaluation",
    "",
    *_evaluation_lines(evaluation),
    "",
    "## Use",
    "",
    *_use(run, plain),
    "",
  ]
  return "\n".join(lines)


def _images(run: Mapping[str, Any]) -> str:
  inputs = run["inputs"]
  if run["model"]["backbone"] == "internvl":
    return f"at most {inputs['max_tiles']} tiles and a thumbnail"
  return f"{inputs['min_pixels']:,} to {inputs['max_pixels']:,} pixels"


def _use(run: Mapping[str, Any], plain: bool) -> list[str]:
  if not plain:
    return _WITH_CODE.splitlines()
  inputs, example = run["inputs"], EXAMPLE
  if run["model"]["backbone"] == "internvl":
    system = json.dumps(inputs["system"] or SYSTEM, ensure_ascii=False)
    example = INTERNVL_EXAMPLE.replace("SYSTEM", system)
  example = example.rstrip().replace(r'"\n\n"', json.dumps(inputs["separator"]))
  words = "With `folder`, `image` (a path), `question` and `steps` (a list of strings):"
  return [words, "", "```python", example, "```"]


def _evaluation_lines(evaluation: Mapping[str, Any] | None) -> list[str]:
  if not evaluation:
    return ["This run was not evaluated."]
  lines = [
    "Figures x 100; every threshold with its origin in its name.",
    "",
    "| threshold | " + " | ".join(_MEASURES) + " |",
    "|---|" + "---|" * len(_MEASURES),
  ]
  for name, block in evaluation["thresholds"].items():
    figures = (block.get(measure) for measure in _MEASURES)
    cells = ("" if figure is None else f"{100 * figure:.2f}" for figure in figures)
    lines.append(f"| {name} ({block['threshold']:.4f}) | " + " | ".join(cells) + " |")
  return lines
