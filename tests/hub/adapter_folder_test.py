"""A folder of PEFT adapters as `--checkpoint`: the scores of its workdir, for bases of every dtype."""

import base64
import dataclasses
import functools
import importlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import bis_jax
from bis_jax.errors import UserError
from bis_jax.evaluation import visual_process_bench
from bis_jax.export import export_adapter, export_run
from bis_jax.hub import hf_folder, weights
from bis_jax.models import backbones, learning_rates
from bis_jax.models.adaptation import MARKER_PATH, is_added, merged
from bis_jax.models.hub_layout import EMBEDDING_PATH
from bis_jax.models.param_tree import split
from bis_jax.models.processor import make_processor
from bis_jax.parallel import sharding
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.restore import load_run
from bis_jax.scoring.solutions import Solution
from bis_jax.settings import locations, workdir
from bis_jax.toy import drawing
from bis_jax.training import checkpoint
from bis_jax.training.train_state import TrainState, first_params, split_trainable
from tests.commands import run_command
from tests.served import Served

pytestmark = pytest.mark.usefixtures("whole_arrays")

MANIFEST = {"strategy": "bis", "fraction": 0.1, "scope": "per_source", "alpha": 0.2, "seed": 0}
MANIFEST |= {"none_positive": 1.0, "rollouts": 100, "digest": "abc123", "lines": {"one": [1, 2]}}
EVALUATION = {"thresholds": {"tuned_on_dev": {"threshold": 0.4375, "roc_auc": 0.9}}}
# (recipe, size, frozen dtype): towers with adapters and trained projectors, in each backbone's files
KINDS = {
  "qwen2_5_vl": ("qwen_bis10", "tiny", "bfloat16"),
  "qwen3_vl": ("qwen3vl_bis10", "tiny", "nf4"),
  "internvl": ("internvl_bis10", "toy", "float32"),
}


@dataclasses.dataclass
class Made:
  """A LoRA run's workdir, its base and its exported adapters."""

  run: pathlib.Path
  base: pathlib.Path
  folder: pathlib.Path


def _config(small_config, backbone, base):
  recipe, size, dtype = KINDS[backbone]
  c = importlib.import_module(f"configs.{recipe}").get_config("toy")
  c.corpus = small_config.corpus
  c.model.size, c.model.checkpoint, c.pretrain.steps = size, str(base), 0
  c.model.learning_rates = (
    (r"merger|mlp1", 1.0),
    (r"visual\.blocks|vision_model\.layers|language_model\.", "lora"),
    (r"visual\.|vision_model", 0.0),
    (".*", 1.0),
  )
  c.model.frozen_dtype, c.lora.rank, c.lora.alpha = dtype, 4, 8.0
  c.inputs.row_patches *= 2
  return c


def _made(small_config, backbone, place: pathlib.Path) -> Made:
  """Makes a base as published ones are, without the step marker, and a run that moved from it."""
  base, run = place / "base", place / "run"
  c = _config(small_config, backbone, base)
  where = locations.locate(c)
  drawing.draw(where.toy, workers=1, **c.corpus.toy)
  processor = make_processor(c, where.tokenizer)
  special = processor.prompt.special
  model = backbones.model_config(c, len(processor.tokenizer), special.prm)
  plain = dataclasses.replace(model, adaptation=None)
  random = split(backbones.build(plain, 0))[1]
  table = np.random.default_rng(0).normal(size=random[EMBEDDING_PATH].shape)
  random[EMBEDDING_PATH] = jnp.asarray(table, "float32")
  hf_folder.write(base, random, plain, processor, base=None, dtype="float32", card="")
  published = json.loads((base / "config.json").read_text())
  del published["step_marker_token_id"]
  (base / "config.json").write_text(json.dumps(published))
  workdir.claim(epath.Path(run), c)
  _, shapes = backbones.structure(model, sharding.make_mesh(**c.mesh))
  params = first_params(model, shapes, epath.Path(base), special, seed=0)
  trained, frozen = split_trainable(params, learning_rates.factors(c, params))
  rng = np.random.default_rng(2)
  trained = {
    path: value + 0.1 * rng.normal(size=value.shape).astype(np.float32)
    for path, value in sorted(trained.items())
  }
  with checkpoint.Checkpoints(epath.Path(run), every=1, keep=1, saves_frozen=False) as checkpoints:
    checkpoints.save(3, TrainState(jnp.int32(3), trained, {"m": jnp.zeros(2)}), frozen)
  (run / "manifest.json").write_text(json.dumps(MANIFEST))
  (run / "evaluation.json").write_text(json.dumps(EVALUATION))
  export_adapter(str(run), epath.Path(place / "adapters"))
  return Made(run, base, place / "adapters")


@pytest.fixture(scope="module")
def makes(small_config, tmp_path_factory):
  return functools.cache(
    lambda backbone: _made(small_config, backbone, tmp_path_factory.mktemp(backbone))
  )


@pytest.fixture(scope="module")
def qwen(makes) -> Made:
  return makes("qwen2_5_vl")


@pytest.fixture(scope="module")
def expected(qwen, some) -> list[np.ndarray]:
  """The workdir's scores."""
  return solutions.score(step_scorer.load(str(qwen.run)), some)


@pytest.fixture(scope="module")
def some(qwen, small_config) -> list[Solution]:
  items = visual_process_bench.load(locations.locate(small_config).benchmark)[:6]
  return [Solution.of(i.question, i.steps, visual_process_bench.encoded_images(i)) for i in items]


def _difference(scores, expected):
  return max(np.abs(a - b).max() for a, b in zip(scores, expected, strict=True))


@pytest.mark.parametrize("backbone", KINDS)
def test_the_folder_is_the_model_of_the_workdir(makes, backbone):
  """Bit for bit; base in bfloat16, nf4 and float32.

  Mutations caught: alpha's scale, halves of an adapter swapped, the marker's row or the projector
  left as in the base.
  """
  made = makes(backbone)
  run, again = load_run(str(made.run)), load_run(str(made.folder))
  assert run.params.keys() == again.params.keys() and run.model.adaptation == again.model.adaptation
  assert any(map(is_added, run.params))
  for path, value in run.params.items():
    np.testing.assert_array_equal(np.asarray(again.params[path]), np.asarray(value), path)


def test_it_scores_as_the_workdir(qwen, some, expected):
  """At most 1e-5, by `bis_jax.load`."""
  model = bis_jax.load(str(qwen.folder))
  difference = _difference(solutions.score(model.scorer, some), expected)
  print(f"\nlargest difference of a score: {difference:.1e}")
  assert difference <= 1e-5 and np.std(np.concatenate(expected)) > 0.01
  assert model.scorer.name == f"{qwen.folder} step 3"
  assert model.scorer.thresholds == {"tuned_on_dev": 0.4375}


def test_a_folder_is_merged_with_its_base(qwen, tmp_path):
  out = tmp_path / "merged"
  assert (
    run_command("export", f"--workdir={qwen.folder}", f"--out={out}", "--dtype=float32") is None
  )
  run = load_run(str(qwen.run))
  whole = merged(run.params, run.model.adaptation)
  for path, value in load_run(str(out)).params.items():
    assert np.abs(np.asarray(value) - np.asarray(whole[path], np.float32)).max() <= 1e-6, path
  card = (out / "README.md").read_text()
  assert "abc123" in card and "0.4375" in card and "LoRA, rank 4" in card


def test_a_run_is_known_again_on_other_devices(makes):
  """The frozen row of a new step marker is a mean, whose last bits depend on the sharding.

  Mutation caught: that row in the base's checksums. A base in bfloat16 would hide the last bits.
  """
  made = makes("internvl")
  for mesh in ({"data": 1, "fsdp": 8, "tensor": 1}, {"data": 1, "fsdp": 2, "tensor": 4}):
    for place in (made.run, made.folder):
      assert MARKER_PATH in load_run(str(place), mesh).params


def test_commands_score_and_serve_with_it(qwen, expected, small_config, tmp_path):
  benchmark = locations.locate(small_config).benchmark
  items = visual_process_bench.load(benchmark)[:6]
  lines, source, out = [], tmp_path / "solutions.jsonl", tmp_path / "scores.jsonl"
  for i, item in enumerate(items):
    names = [f"{i}_{k}.png" for k in range(len(item.images))]
    for name, data in zip(names, visual_process_bench.encoded_images(item), strict=True):
      (tmp_path / name).write_bytes(data)
    lines.append({"id": i, "question": item.question, "images": names, "steps": list(item.steps)})
  source.write_text("".join(json.dumps(line) + "\n" for line in lines))
  flags = (f"--checkpoint={qwen.folder}", f"--input={source}", f"--output={out}")
  assert run_command("score", *flags) is None
  scores = [np.array(json.loads(line)["scores"]) for line in out.read_text().splitlines()]
  assert _difference(scores, expected) <= 1e-5
  scorer = step_scorer.load(str(qwen.folder), adapt_rows=False, workers=0)
  scorer.warm_up(0)
  served = Served(scorer)
  try:
    images = [
      base64.b64encode(data).decode() for data in visual_process_bench.encoded_images(items[0])
    ]
    body = {"question": items[0].question, "steps": list(items[0].steps), "images": images}
    status, answer = served.call(body)[:2]
    assert status == 200 and _difference([np.array(answer["scores"])], expected[:1]) <= 1e-5
  finally:
    served.stop()


def test_a_base_elsewhere_is_named_and_another_refused(qwen, tmp_path):
  folder, base = tmp_path / "adapters", tmp_path / "moved"
  shutil.copytree(qwen.folder, folder)
  config = json.loads((folder / "adapter_config.json").read_text())
  config["base_model_name_or_path"] = str(tmp_path / "gone")
  (folder / "adapter_config.json").write_text(json.dumps(config))
  with pytest.raises(
    UserError, match="the base of the adapters in .* is missing: name it with --base"
  ):
    load_run(str(folder))
  shutil.copytree(qwen.base, base)
  assert load_run(str(folder), base=str(base)).step == 3
  with pytest.raises(
    UserError, match=r"up_proj|embed|.* is not what the adapters in .* were trained"
  ):
    export_run(
      str(qwen.folder), epath.Path(tmp_path / "wrong"), "float32", str(_other(base, tmp_path))
    )
  small = tmp_path / "small"
  shutil.copytree(base, small)
  raw = json.loads((small / "config.json").read_text())
  raw["text_config"]["num_hidden_layers"] += 1
  (small / "config.json").write_text(json.dumps(raw))
  with pytest.raises(weights.WeightsError, match="text num_hidden_layers"):
    load_run(str(folder), base=str(small))


def _other(base, tmp_path):
  """Returns a copy of a base of which one value differs."""
  from safetensors.numpy import load_file, save_file

  other = tmp_path / "other"
  shutil.copytree(base, other)
  [file] = other.glob("*.safetensors")
  tensors = load_file(file)
  name = next(key for key in tensors if "layers.1.mlp.up_proj" in key)
  tensors[name] = tensors[name].copy()
  tensors[name][3, 5] += 1
  save_file(tensors, file, {"format": "pt"})
  return other


def _without(file: str):
  return lambda folder: (folder / file).unlink()


def _with_rank(folder):
  config = json.loads((folder / "bis_jax.json").read_text())
  config["config"]["lora"]["rank"] = 8
  (folder / "bis_jax.json").write_text(json.dumps(config))


def _truncated(folder):
  file = folder / "adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (_without("bis_jax.json"), "holds weights but no bis_jax.json"),
    (_without("adapter_model.safetensors"), "adapter_model.safetensors is missing or damaged"),
    (_truncated, "adapter_model.safetensors is missing or damaged"),
    (_with_rank, "are not those that its bis_jax.json describes"),
  ],
)
def test_a_folder_that_is_not_whole_is_refused(qwen, tmp_path, change, words):
  folder = tmp_path / "adapters"
  shutil.copytree(qwen.folder, folder)
  change(folder)
  with pytest.raises(UserError, match=words):
    load_run(str(folder))


def test_what_does_not_go_together_is_refused(qwen, tmp_path):
  with pytest.raises(UserError, match="--base is .*, but .* holds no adapters: leave it out"):
    load_run(str(qwen.run), base=str(qwen.base))
  ended = run_command("export", "--adapter", f"--workdir={qwen.folder}", f"--out={tmp_path / 'x'}")
  assert "is a folder of adapters already" in ended
  run = load_run(str(qwen.run))
  special = run.processor.prompt.special
  with pytest.raises(UserError, match="holds adapters of PEFT and no whole model: merge them with"):
    shapes = {
      path: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding)
      for path, v in run.params.items()
    }
    first_params(run.model, shapes, epath.Path(qwen.folder), special, seed=0)
  flags = (f"--benchmark={tmp_path}", "--scores=x.jsonl", "--out=x.json", "--base=b")
  assert "--base is read only for adapters" in run_command("evaluate", *flags)
