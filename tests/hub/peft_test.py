"""A run's adapters as a PEFT folder: `peft` on Transformers' model gives our scores."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from bis_jax.errors import UserError
from bis_jax.evaluation import visual_process_bench
from bis_jax.hub import hf_folder, peft_folder
from bis_jax.hub.card import model_card
from bis_jax.models import backbones
from bis_jax.models.adaptation import is_adapter
from bis_jax.models.internvl.config import SIZES as INTERNVL_SIZES
from bis_jax.models.model_config import Adaptation
from bis_jax.models.param_tree import split
from bis_jax.models.processor import make_processor
from bis_jax.parallel import sharding
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solutions import Solution
from bis_jax.settings import locations
from bis_jax.toy import drawing
from bis_jax.training.train_state import first_params

RULES = (("merger", 1.0), (r"visual\.", "lora"), (r"language_model\.", "lora"), (".*", 1.0))
MANIFEST = {"strategy": "bis", "fraction": 0.1, "scope": "per_source", "alpha": 0.2}
MANIFEST |= {"none_positive": 1.0, "seed": 0, "rollouts": 4800, "digest": "abc123"}


def _perturbed(params, trained, scale=0.1):
  """Returns parameters in which everything that trains has moved."""
  rng = np.random.default_rng(2)
  return params | {
    path: params[path] + scale * rng.normal(size=params[path].shape).astype(np.float32)
    for path in sorted(trained)
  }


def test_the_cards_example_gives_our_scores(small_config, tmp_path):
  """At most 1e-4, with adapters on tower and decoder, a trained projector, marker row and head."""
  where = locations.locate(small_config)
  drawing.draw(where.toy, workers=1, **small_config.corpus.toy)
  processor = make_processor(small_config, where.tokenizer)
  special = processor.prompt.special
  plain = backbones.model_config(small_config, len(processor.tokenizer))
  base, out = tmp_path / "base", tmp_path / "adapter"
  random = split(backbones.build(plain, 0))[1]
  hf_folder.write(base, random, plain, processor, base=None, dtype="float32", card="")
  own = Adaptation(RULES, "float32", rank=4, alpha=8.0, dropout=0.0, marker_token=special.prm)
  model = dataclasses.replace(plain, adaptation=own)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  graph, shapes = backbones.structure(model, mesh)
  trained = {p for p in shapes if is_adapter(p) or p.startswith(("visual.merger", "reward_head"))}
  params = _perturbed(first_params(model, shapes, base, special, seed=0), trained)
  inputs = small_config.inputs.copy_and_resolve_references()
  inputs.row_patches = 512
  scorer = step_scorer.Scorer(processor, inputs, mesh, graph, params, batch_rows=8)

  run = json.loads(small_config.to_json())
  run["model"]["learning_rates"] = RULES
  block = {"threshold": 0.5, "overall_source_weighted": 0.8123, "roc_auc": None}
  card = model_card(
    run=run,
    processor=processor,
    manifest=MANIFEST,
    evaluation={"thresholds": {"fixed_0.5": block}},
    step=12,
    other_rows="those of the base",
    adapter_of=str(base),
  )
  peft_folder.write(
    out, params, trained, model, processor, base=base, base_name=str(base), card=card
  )
  assert "library_name: peft" in card and "LoRA, rank 16" in card
  items = visual_process_bench.load(where.benchmark)[:3]
  example = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
  differences, spread = [], []
  for item in items:
    [picture] = visual_process_bench.encoded_images(item, "first")
    [ours] = solutions.score(scorer, [Solution.of(item.question, item.steps, [picture])])
    image = tmp_path / "image.png"
    image.write_bytes(picture)
    names = {"folder": out, "image": image, "question": item.question, "steps": item.steps}
    exec(example, names)
    theirs = names["scores"].numpy()
    differences.append(np.abs(ours - theirs).max())
    spread += theirs.tolist()
  print(f"\nlargest difference of a step probability: {max(differences):.1e}")
  assert max(differences) < 1e-4 and np.std(spread) > 1e-3
  held = load_file(out / "adapter_model.safetensors")
  assert sum(v.nbytes for v in held.values()) < sum(v.nbytes for v in random.values())


def test_fused_tensors_are_refused(tmp_path):
  """InternLM2.5's files hold queries, keys and values as one, which PEFT would adapt as one."""
  config = INTERNVL_SIZES["tiny"].with_vocabulary(128)
  own = Adaptation(
    (("language_model", "lora"), (".*", 1.0)), "float32", rank=2, alpha=2, dropout=0, marker_token=1
  )
  model = dataclasses.replace(config, adaptation=own)
  params = split(backbones.build(model, 0))[1]
  base = tmp_path / "base"
  base.mkdir()
  (base / "config.json").write_text(json.dumps(config.to_hugging_face()))
  processor = dataclasses.make_dataclass("Processor", ["prompt"])(None)
  with pytest.raises(UserError, match="which PEFT adapts as a whole: export the merged model"):
    peft_folder.write(
      tmp_path / "out",
      params,
      {p for p in params if is_adapter(p)},
      model,
      processor,
      base=base,
      base_name="base",
      card="",
    )
