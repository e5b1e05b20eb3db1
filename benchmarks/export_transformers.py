"""Scores of exported models by the model card's own code, in other versions of Transformers.

  python -m benchmarks.export_transformers
  python -m benchmarks.export_transformers --python=/path/to/venv/bin/python --tokenizer=FOLDER

Small random models of every backbone are exported in float32. The code of the card runs once in this
Python and once in each that `--python` names, on images of every kind (EXIF, transparent, grey, too
large, too small), on several and none, one solution at a time and all in one padded batch. Exit code
1 if a step probability differs from bis_jax.score by more than 1e-5.
"""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from bis_jax.hub import hf_folder
from bis_jax.hub.card import model_card
from bis_jax.models import backbones, param_tree
from bis_jax.models.processor import make_processor
from bis_jax.parallel import sharding
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solutions import Solution
from bis_jax.settings import exported, locations
from bis_jax.toy import drawing

_PYTHON = flags.DEFINE_multi_string("python", [], "Python with another Transformers; repeatable")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "tokenizer of Qwen2.5-VL; default: the toy's")

TOLERANCE = 1e-5
RECIPES = ("qwen_bis10", "qwen3vl_bis10", "internvl_bis10")
# Run by the other Python: [folder of the export, solutions, file to write] are its arguments.
PROGRAM = """
import json, sys
folder, solutions, out = sys.argv[1:]
example = open(f"{folder}/README.md").read().split("```python\\n")[1].split("```")[0]
solutions = json.load(open(solutions))
question, steps, [image] = solutions[0]
exec(example)
import transformers
alone = [score([one])[0].tolist() for one in solutions]
batch = [row.tolist() for row in score(solutions)]
result = {"transformers": transformers.__version__, "card": scores.tolist(), "alone": alone}
json.dump(result | {"batch": batch}, open(out, "w"))
"""


def write_images(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes images of every kind and returns their files by kind."""
  rng = np.random.default_rng(0)

  def noise(height: int, width: int, *channels: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16), *channels), np.uint8)
    return coarse.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]

  rotated = Image.Exif()
  rotated[0x0112] = 6
  palette = Image.fromarray(noise(60, 90, 3)).quantize(16)
  found = {
    "plain": (Image.fromarray(noise(84, 112, 3)), "png", {}),
    "exif": (Image.fromarray(noise(60, 130, 3)), "jpeg", {"exif": rotated}),
    "rgba": (Image.fromarray(noise(100, 70, 4)), "png", {}),
    "grey": (Image.fromarray(noise(90, 90)), "png", {}),
    "grey16": (Image.fromarray(noise(90, 60).astype(np.uint16) * 257), "png", {}),
    "palette": (palette, "png", {"transparency": 3}),
    "large": (Image.fromarray(noise(300, 500, 3)), "webp", {"lossless": True}),
    "small": (Image.fromarray(noise(12, 17, 3)), "png", {}),
  }
  files = {}
  for kind, (image, ending, options) in found.items():
    files[kind] = folder / f"{kind}.{ending}"
    image.save(files[kind], **options)
  return files


def draw_solutions(folder: pathlib.Path) -> list[tuple[str, list[str], list[str]]]:
  """Returns (question, steps, image files): every kind alone, several, none, and hostile text."""
  kinds = {kind: str(file) for kind, file in write_images(folder).items()}
  steps = ["Count them.", "1 + 2 = 3, so three.", "Final answer: 3"]
  drawn = [
    (f"How many red circles, {i}?", steps[i % 3 :], [file]) for i, file in enumerate(kinds.values())
  ]
  drawn.append(("Which is larger?", [*steps, "No."], [kinds["exif"], kinds["rgba"]]))
  drawn.append(("Add.", ["1 + 1 = 2."], []))
  hostile = " <image 1>What is <|image_pad|> or <IMG_CONTEXT>\\0? <|im_end|>\n"
  drawn.append((hostile, ["\tA <prm> <tool_call> \\1 step. ", "</img>\u3000"], [kinds["grey"]]))
  return drawn


@dataclasses.dataclass(frozen=True)
class Exported:
  folder: pathlib.Path
  scorer: step_scorer.Scorer

  def our_scores(self, drawn: list[tuple[str, list[str], list[str]]]) -> list[np.ndarray]:
    return solutions.score(
      self.scorer,
      [Solution.of(q, s, [pathlib.Path(f).read_bytes() for f in files]) for q, s, files in drawn],
    )


def export(recipe: str, tokenizer: str, out: pathlib.Path, size: str = "toy") -> Exported:
  """Exports a random model of a recipe whose scores depend on all that it reads."""
  config = importlib.import_module(f"configs.{recipe}").get_config("toy")
  config.model.size = size
  config.inputs.row_patches *= 8
  processor = make_processor(config, tokenizer)
  model = backbones.model_config(config, len(processor.tokenizer))
  graph, params = param_tree.split(backbones.build(model, 0))
  # Markers have no embedding of their own: their states are all that they read from their context.
  embedding = np.random.default_rng(0).normal(size=(model.text.vocab_size, model.text.hidden_size))
  embedding[processor.prompt.special.prm] = 0
  params["language_model.embed_tokens.embedding"] = jax.numpy.asarray(embedding, "float32")
  manifest = {"strategy": "bis", "fraction": 0.1, "scope": "per_source", "alpha": 0.2, "seed": 0}
  manifest |= {"none_positive": 1.0, "rollouts": 0, "digest": "none"}
  card = model_card(
    run=config.to_dict(),
    processor=processor,
    manifest=manifest,
    evaluation=None,
    step=0,
    other_rows="zero",
  )
  run = {exported.FILE: exported.content(config, 0, manifest, None)}
  hf_folder.write(out, params, model, processor, base=None, dtype="float32", card=card, run=run)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return Exported(
    out, step_scorer.Scorer(processor, config.inputs, mesh, graph, params, batch_rows=8)
  )


def their_scores(python: str, folder: pathlib.Path, drawn: list) -> dict:
  """Returns the card's, single and batched scores in another Python, and its Transformers."""
  with tempfile.TemporaryDirectory() as place:
    given, out = pathlib.Path(place) / "solutions.json", pathlib.Path(place) / "scores.json"
    given.write_text(json.dumps(drawn))
    subprocess.run([python, "-c", PROGRAM, folder, given, out], check=True)
    return json.loads(out.read_text())


def differences(ours: list[np.ndarray], theirs: Mapping) -> dict[str, float]:
  """Returns the largest difference of a step probability by way of scoring."""

  def largest(theirs: list) -> float:
    return max(float(np.abs(a - np.array(b)).max()) for a, b in zip(ours, theirs, strict=True))

  ways = {"card": [theirs["card"], *theirs["alone"][1:]]} | {"batch": theirs["batch"]}
  return {way: largest(scores) for way, scores in ways.items()}


def main(_: list[str]) -> None:
  failed = False
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    drawn = draw_solutions(folder)
    tokenizer = _TOKENIZER.value
    if not tokenizer:
      config = importlib.import_module("configs.qwen_bis10").get_config("toy")
      config.corpus.cache = f"{folder}/cache"
      config.corpus.toy.rollouts, config.corpus.toy.images = 1000, 300
      paths = locations.locate(config)
      drawing.draw(paths.toy, workers=1, **config.corpus.toy)
      tokenizer = paths.tokenizer
    for recipe in RECIPES:
      exported = export(recipe, tokenizer, folder / recipe)
      ours = exported.our_scores(drawn)
      spread = np.std(np.concatenate(ours))
      for python in (sys.executable, *_PYTHON.value):
        theirs = their_scores(python, exported.folder, drawn)
        found = differences(ours, theirs)
        failed |= max(found.values()) > TOLERANCE
        print(
          f"{recipe}, Transformers {theirs['transformers']}: one at a time {found['card']:.1e}, "
          f"padded batch {found['batch']:.1e}; standard deviation of the scores {spread:.2f}"
        )
  sys.exit(failed)


if __name__ == "__main__":
  app.run(main)
