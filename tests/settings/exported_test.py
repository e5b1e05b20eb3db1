"""An exported folder scores and trains on as the workdir that it came from, wherever it is."""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

import bis_jax
from bis_jax.evaluation import visual_process_bench
from bis_jax.export import export_run
from bis_jax.models import backbones
from bis_jax.models.processor import make_processor
from bis_jax.parallel import sharding
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.restore import load_run
from bis_jax.scoring.solutions import Solution
from bis_jax.settings import exported, locations, workdir
from bis_jax.settings.workdir import WorkdirError
from bis_jax.toy import drawing
from bis_jax.training import checkpoint, train_state
from bis_jax.training.train_state import TrainState

pytestmark = pytest.mark.usefixtures("programs_once")

MANIFEST = {"strategy": "bis", "fraction": 0.1, "scope": "per_source", "alpha": 0.2, "seed": 0}
MANIFEST |= {"none_positive": 1.0, "rollouts": 100, "digest": "abc123"}
THRESHOLDS = {"fixed_0.5": 0.5, "tuned_on_dev": 0.4375}


def make_workdir(config, folder: epath.Path) -> epath.Path:
  """Makes the workdir of a finished run with random parameters whose scores differ."""
  where = locations.locate(config)
  drawing.draw(where.toy, workers=1, **config.corpus.toy)
  workdir.claim(folder, config)
  processor = make_processor(config, where.tokenizer)
  mesh = sharding.make_mesh(**config.mesh)
  model = backbones.model_config(config, len(processor.tokenizer))
  _, shapes = backbones.structure(model, mesh)
  params = train_state.first_params(model, shapes, None, processor.prompt.special, config.seed)
  embedding = np.random.default_rng(0).normal(size=params[EMBEDDING].shape)
  params[EMBEDDING] = jnp.asarray(embedding, "float32")
  trained, frozen = train_state.split_trainable(params, dict.fromkeys(params, 1.0))
  with checkpoint.Checkpoints(folder, every=1, keep=1) as checkpoints:
    checkpoints.save(3, TrainState(jnp.int32(3), trained, {"m": jnp.zeros(2)}), frozen)
  (folder / "manifest.json").write_text(json.dumps(MANIFEST))
  blocks = {name: {"threshold": value, "roc_auc": 0.9} for name, value in THRESHOLDS.items()}
  (folder / "evaluation.json").write_text(json.dumps({"thresholds": blocks}))
  return folder


EMBEDDING = "language_model.embed_tokens.embedding"


@pytest.fixture(scope="module", params=["qwen_bis10", "internvl_bis10"])
def config(request, small_config):
  config = importlib.import_module(f"configs.{request.param}").get_config("toy")
  config.corpus = small_config.corpus
  config.model.size = "tiny" if request.param == "qwen_bis10" else "toy"
  config.inputs.row_patches *= 2
  return config.lock()


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
  return make_workdir(config, epath.Path(tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def some(config, place):
  items = visual_process_bench.load(locations.locate(config).benchmark)
  read = [Solution.of(i.question, i.steps, visual_process_bench.encoded_images(i)) for i in items]
  return [*read[:19], Solution.of("Add 1 and 2.", ["1 + 2 = 3.", "Final answer: 3"])]


@pytest.fixture(scope="module")
def expected(place, some):
  return solutions.score(step_scorer.load(str(place)), some)


def moved(place, target: pathlib.Path, dtype: str) -> str:
  """Exports a copy of the workdir, deletes the copy and moves the export."""
  copy = target / "copy"
  shutil.copytree(place, copy)
  export_run(str(copy), epath.Path(target / "out"), dtype, None)
  shutil.rmtree(copy)
  return str(shutil.move(target / "out", target / "elsewhere"))


@pytest.fixture(scope="module")
def folder(place, tmp_path_factory):
  return moved(place, tmp_path_factory.mktemp("export"), "float32")


def test_the_folder_scores_as_the_workdir(folder, some, expected):
  scorer = step_scorer.load(folder)
  scores = solutions.score(scorer, some)
  difference = max(np.abs(a - b).max() for a, b in zip(scores, expected, strict=True))
  print(f"\nlargest difference of a score, float32: {difference:.1e}")
  assert difference <= 1e-6
  assert np.std(np.concatenate(scores)) > 0.01
  assert scorer.name == f"{folder} step 3" and scorer.thresholds == THRESHOLDS


def test_a_bfloat16_folder_scores_nearly_so(place, some, expected, tmp_path):
  scores = solutions.score(step_scorer.load(moved(place, tmp_path, "bfloat16")), some)
  difference = max(np.abs(a - b).max() for a, b in zip(scores, expected, strict=True))
  print(f"\nlargest difference of a score, bfloat16 folder: {difference:.1e}")
  assert 1e-6 < difference < 0.03


def test_the_folder_names_no_place_of_the_machine(config, folder):
  held = (pathlib.Path(folder) / exported.FILE).read_text()
  assert str(config.corpus.cache) not in held and "digest" in held
  assert json.loads(held)["manifest_digest"] == "abc123"


def test_load_is_called_with_question_images_and_steps(config, folder, some, tmp_path):
  model = bis_jax.load(folder)
  item = visual_process_bench.load(locations.locate(config).benchmark)[0]
  (expected,) = solutions.score(model.scorer, some[:1])
  encoded = visual_process_bench.encoded_images(item)
  paths = [tmp_path / f"{i}.png" for i in range(len(encoded))]
  for path, data in zip(paths, encoded, strict=True):
    path.write_bytes(data)
  for images in (encoded, paths, [Image.open(path) for path in paths]):
    np.testing.assert_array_equal(model(item.question, images, item.steps), expected)
  with pytest.raises(solutions.SolutionError, match="must be a list"):
    model(item.question, None, "one text")


def test_best_of_n_scores_candidates_with_the_folder(config, folder, expected, command, tmp_path):
  """Those that have scores keep them; images are beside the file."""
  items = visual_process_bench.load(locations.locate(config).benchmark)[:2]
  lines = []
  for i, item in enumerate(items):
    names = [f"{i}_{k}.png" for k in range(len(item.images))]
    for name, data in zip(names, visual_process_bench.encoded_images(item), strict=True):
      (tmp_path / name).write_bytes(data)
    candidates = [{"steps": list(item.steps), "correct": True, "answer": "1"}]
    candidates += [{"steps": ["Ready."], "scores": [0.25], "correct": False, "answer": "2"}]
    lines.append({"id": i, "question": item.question, "images": names, "candidates": candidates})
  source, scored = tmp_path / "candidates.jsonl", tmp_path / "scored.jsonl"
  source.write_text("".join(json.dumps(line) + "\n" for line in lines))
  flags = (f"--candidates={source}", f"--checkpoint={folder}", f"--out={tmp_path / 'bon.json'}")
  ended = command("bis_jax.evaluate", *flags, f"--save_scores={scored}", "--bootstrap_draws=0")
  assert ended.returncode == 0, ended.stderr
  for line, scores in zip(scored.read_text().splitlines(), expected, strict=False):
    first, second = json.loads(line)["candidates"]
    np.testing.assert_allclose(first["scores"], scores, atol=1e-6)
    assert second["scores"] == [0.25]
  assert json.loads((tmp_path / "bon.json").read_text())["n"] == [1, 2]
  ended = command("bis_jax.evaluate", *flags)
  assert ended.returncode == 1 and "--save_scores=FILE for the scored ones" in ended.stderr
  lines[1]["images"] = ["gone.png"]
  source.write_text("".join(json.dumps(line) + "\n" for line in lines))
  ended = command("bis_jax.evaluate", *flags, f"--save_scores={tmp_path / 'more.jsonl'}")
  assert "candidates.jsonl: question 1 candidate 0: image 'gone.png' is not below" in ended.stderr


def test_importing_bis_jax_imports_nothing_heavy():
  program = "import sys, bis_jax; print([m for m in ('jax', 'numpy', 'PIL') if m in sys.modules])"
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert run.stdout == "[]\n"


def test_other_folders_are_named(folder, tmp_path):
  with pytest.raises(WorkdirError, match="name a workdir, an exported folder or a hub id"):
    step_scorer.load(str(tmp_path / "gone"))
  plain = tmp_path / "plain"
  shutil.copytree(folder, plain)
  (plain / exported.FILE).unlink()
  with pytest.raises(WorkdirError, match=r"no bis_jax.json, so it is not an exported reward model"):
    step_scorer.load(str(plain))
  (plain / exported.FILE).write_text('{"config": 3}')
  with pytest.raises(WorkdirError, match=r"bis_jax.json is damaged .*: export the run again"):
    step_scorer.load(str(plain))
  held = json.loads((pathlib.Path(folder) / exported.FILE).read_text())
  held["config"]["inputs"]["max_length"] = -1
  (plain / exported.FILE).write_text(json.dumps(held))
  with pytest.raises(WorkdirError, match=r"inputs.max_length is -1; it must be"):
    step_scorer.load(str(plain))


def test_training_on_starts_from_the_folders_parameters(config, folder, place):
  """The step marker and the reward head are those of the run, not new ones."""
  new = config.copy_and_resolve_references()
  with new.unlocked():
    new.model.checkpoint = new.inputs.tokenizer = folder
  where = locations.require(new, locations.locate(new))
  processor = make_processor(new, where.tokenizer)
  model = backbones.model_config(new, len(processor.tokenizer))
  _, shapes = backbones.structure(model, sharding.make_mesh(**new.mesh))
  special = processor.prompt.special
  params = train_state.first_params(model, shapes, epath.Path(folder), special, seed=5)
  for path, value in load_run(str(place)).params.items():
    np.testing.assert_array_equal(params[path], value, err_msg=path)


def test_a_run_that_reads_its_inputs_otherwise_is_told(config, folder):
  place = epath.Path(folder)
  assert exported.differences(place, config) == []
  assert exported.differences(place.parent, config) == []
  other = config.copy_and_resolve_references()
  with other.unlocked():
    other.inputs.separator = ""
  (line,) = exported.differences(place, other)
  assert line.startswith("config.inputs.separator is '', ") and "was trained with '\\n\\n'" in line
