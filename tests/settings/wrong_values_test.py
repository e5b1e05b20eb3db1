"""A hundred wrong configs: each is one sentence that names the key and the remedy, before any work."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from bis_jax.models.qwen2_5_vl.config import SIZES
from bis_jax.toy.tokenizer import train_tokenizer

# What follows --config=toy_bis10, and what the sentence says.
FLAGS = [
  # Types
  ("seed=one", "config.seed is 'one'; it must be >= 0 and < 2147483648, a whole number"),
  ("seed=1.5", "config.seed is 1.5; it must be"),
  ("seed=True", "config.seed is True; it must be"),
  ("seed=", "config.seed is ''; it must be"),
  ("selection.fraction=tenth", "selection.fraction is 'tenth'; it must be"),
  ("selection.fraction=10%", "selection.fraction is '10%'; it must be"),
  ("selection.fraction=(0.1,)", "selection.fraction is (0.1,); it must be"),
  ("selection.per_source=maybe", "selection.per_source is 'maybe'; it must be True or False"),
  ("evaluation.blank_images=2", "evaluation.blank_images is '2'; it must be True or False"),
  ("train.global_batch=16.0", "train.global_batch is 16.0; it must be"),
  ("train.global_batch=1e3", "train.global_batch is 1000.0; it must be"),
  ("train.profile_steps=3", "train.profile_steps is 3; it must be >= 0, a pair of whole numbers"),
  ("train.profile_steps=(1,2,3)", "train.profile_steps is (1, 2, 3); it must be >= 0, a pair"),
  ("train.profile_steps=(1,'a')", "train.profile_steps is (1, 'a'); it must be >= 0, a pair"),
  ("train.profile_steps=(-1,5)", "train.profile_steps is (-1, 5); it must be >= 0, a pair"),
  ("mesh.data=all", "mesh.data is 'all'; it must be"),
  ("optim.learning_rate=[1e-3]", "optim.learning_rate is [0.001]; it must be"),
  ("optim.b1=None", "optim.b1 is None; it must be"),
  ("qwen2_5_vl.max_pixels=1M", "qwen2_5_vl.max_pixels is '1M'; it must be"),
  # Not finite, or absurd
  ("optim.learning_rate=inf", "optim.learning_rate is 'inf'; it must be > 0"),
  ("optim.learning_rate=1e999", "optim.learning_rate is inf; it must be > 0"),
  ("optim.learning_rate=nan", "optim.learning_rate is 'nan'; it must be > 0"),
  ("optim.learning_rate=0", "optim.learning_rate is 0.0; it must be > 0"),
  ("optim.learning_rate=-1e-5", "optim.learning_rate is -1e-05; it must be > 0"),
  ("optim.learning_rate=1000", "optim.learning_rate is 1000.0; it must be > 0 and <= 1"),
  ("pretrain.learning_rate=1e999", "pretrain.learning_rate is inf; it must be"),
  ("selection.alpha=1e999", "selection.alpha is inf; it must be >= 0"),
  ("selection.alpha=-inf", "selection.alpha is '-inf'; it must be >= 0"),
  ("selection.fraction=1e-300", "selection.fraction is 1e-300; it must be >= 0.0001"),
  ("selection.fraction=0", "selection.fraction is 0.0; it must be"),
  ("selection.fraction=10", "selection.fraction is 10.0; it must be"),
  ("seed=1e20", "seed is 1e+20; it must be"),
  ("seed=100000000000000000000", "seed is 100000000000000000000; it must be"),
  ("seed=-1", "seed is -1; it must be >= 0"),
  ("seed=4294967296", "seed is 4294967296; it must be >= 0"),
  ("corpus.toy.seed=1e20", "corpus.toy.seed is 1e+20; it must be"),
  ("pretrain.seed=-2", "pretrain.seed is -2; it must be >= -1"),
  ("train.epochs=0", "train.epochs is 0; it must be"),
  ("train.epochs=99999999999", "train.epochs is 99999999999; it must be"),
  ("train.steps=-1", "train.steps is -1; it must be"),
  ("train.global_batch=0", "train.global_batch is 0; it must be"),
  ("train.log_every=0", "train.log_every is 0; it must be"),
  ("train.checkpoint_every=0", "train.checkpoint_every is 0; it must be"),
  ("train.keep_checkpoints=0", "train.keep_checkpoints is 0; it must be"),
  ("train.accumulate=-1", "train.accumulate is -1; it must be"),
  ("optim.warmup_fraction=1", "optim.warmup_fraction is 1.0; it must be"),
  ("optim.warmup_fraction=nan", "optim.warmup_fraction is 'nan'; it must be"),
  ("optim.weight_decay=-0.1", "optim.weight_decay is -0.1; it must be"),
  ("optim.weight_decay=1e10", "optim.weight_decay is 10000000000.0; it must be"),
  ("optim.b1=1", "optim.b1 is 1.0; it must be"),
  ("optim.b2=1.5", "optim.b2 is 1.5; it must be"),
  ("optim.eps=0", "optim.eps is 0.0; it must be"),
  ("optim.clip=0", "optim.clip is 0.0; it must be"),
  ("optim.clip=1e999", "optim.clip is inf; it must be"),
  ("optim.moment_dtype=float16", "optim.moment_dtype is 'float16'; it must be one of float32"),
  ("corpus.tau=1", "corpus.tau is 1.0; it must be"),
  ("corpus.tau=-0.5", "corpus.tau is -0.5; it must be"),
  ("corpus.workers=-1", "corpus.workers is -1; it must be"),
  ("corpus.workers=1000000", "corpus.workers is 1000000; it must be"),
  ("corpus.max_rejected_fraction=2", "corpus.max_rejected_fraction is 2.0; it must be"),
  ("corpus.name=mine", "corpus.name is 'mine'; it must be one of visualprm, toy"),
  ("corpus.cache=", "corpus.cache is ''; it must be not empty, text"),
  ("corpus.unmeasured=positive", "corpus.unmeasured is 'positive'; it must be one of negative"),
  ("corpus.toy.rollouts=10", "corpus.toy.rollouts is 10; it must be"),
  ("corpus.toy.images=1e6", "corpus.toy.images is 1000000.0; it must be"),
  ("corpus.toy.n_mc=0", "corpus.toy.n_mc is 0; it must be"),
  ("corpus.toy.slip=-1", "corpus.toy.slip is -1.0; it must be"),
  ("corpus.toy.lapse=nan", "corpus.toy.lapse is 'nan'; it must be"),
  ("selection.strategy=best", "selection.strategy is 'best'; it must be one of bis"),
  ("labels.kind=true", "labels.kind is 'true'; it must be one of hard"),
  ("labels.band_low=-1", "labels.band_low is -1.0; it must be"),
  ("inputs.max_length=1", "inputs.max_length is 1; it must be"),
  ("inputs.row_patches=100", "inputs.row_patches is 100; it must be"),
  ("inputs.row_markers=0", "inputs.row_markers is 0; it must be"),
  ("inputs.workers=-1", "inputs.workers is -1; it must be"),
  ("inputs.prefetch=0", "inputs.prefetch is 0; it must be"),
  (
    "model.backbone=llava",
    "model.backbone is 'llava'; it must be one of qwen2_5_vl, qwen3_vl, internvl",
  ),
  ("model.dtype=float8", "model.dtype is 'float8'; it must be one of float32, bfloat16"),
  ("model.remat=all", "model.remat is 'all'; it must be one of auto, full"),
  ("model.attention=flash", "model.attention is 'flash'; it must be one of auto"),
  ("model.marker_noise=1e999", "model.marker_noise is inf; it must be"),
  ("loss.normalise=batch", "loss.normalise is 'batch'; it must be one of global"),
  ("mesh.data=0", "mesh.data is 0; it must be >= 1 or = -1, a whole number"),
  ("mesh.tensor=-2", "mesh.tensor is -2; it must be >= 0 or = -1, a whole number"),
  ("evaluation.images=none", "evaluation.images is 'none'; it must be one of multi"),
  ("evaluation.every=-5", "evaluation.every is -5; it must be"),
  ("evaluation.batch_rows=0", "evaluation.batch_rows is 0; it must be"),
  # Typos
  (
    "selection.fracton=0.1",
    "Unknown command line flag 'config.selection.fracton'. Did you mean: config.selection.fraction",
  ),
  ("optim.learningrate=0.1", "Did you mean: config.optim.learning_rate"),
  ("train.accumulte=2", "Did you mean: config.train.accumulate"),
  ("sead=2", "Did you mean: config.seed"),
  ("selection=0.5", "Unknown command line flag 'config.selection'"),
  ("optim.warmup=0.1", "it is now config.optim.warmup_fraction"),
  ("inputs.max_pixels=100", "it is now config.qwen2_5_vl.max_pixels"),
  # Mismatches
  ("model.size=7b", "model.size is '7b', a published size, which cannot be trained from the toy"),
  (
    "model.size=70b",
    "model.size is '70b'; it must be one of tiny, toy, toy32, 3b, 7b, 32b, 72b (qwen2_5_vl)",
  ),
  ("model.checkpoint=Qwen/Qwen2.5-VL-7B-Instruct", "pretrain.steps is 2000, but only the toy"),
  ("internvl.max_tiles=9", "internvl.max_tiles is 9, which qwen2_5_vl does not read"),
  ("corpus.name=visualprm", "pretrain.steps is 2000, but only the toy corpus has captions"),
  ("corpus.toy.kinds=8", "corpus.toy.kinds is 8 and first_kind is 0: give multiples of 6"),
  ("labels.band_low=0.9", "labels.band_low (0.9) must not exceed config.labels.band_high (0.5)"),
  ("inputs.max_length=512", "inputs.max_length (512) must not exceed config.inputs.row_tokens"),
  ("qwen2_5_vl.max_pixels=9999999", "inputs.max_length (256) holds: lower max_pixels"),
  ("qwen2_5_vl.min_pixels=99999", "min_pixels (99999) must not exceed"),
  ("model.attention=splash", "model.attention is 'splash', a kernel for tpu, but this is cpu: set"),
  ("train.accumulate=3", "set config.inputs.row_multiple to a multiple of 24"),
  ("inputs.row_multiple=12", "set config.inputs.row_multiple to a multiple of 8"),
  ("mesh.data=3", "there are 8"),
  ("mesh.tensor=16", "there are 8"),
  ("mesh.fsdp=-1", "set at most one of its sizes to -1"),
  # Learning-rate rules
  ('model.learning_rates=((".*", 0.0),)', "freezes every parameter: give a rule a factor above 0"),
  (
    'model.learning_rates=(("visual_tower", 0.0), (".*", 1.0))',
    "'visual_tower' matches no parameter of qwen2_5_vl; the nearest are visual.",
  ),
  (
    'model.learning_rates=((".*", 1.0), ("visual", 0.0))',
    "the rules before 'visual' decide all that it matches: put it first",
  ),
  ('model.learning_rates=(("visual", 0.0),)', "no rule matches language_model."),
  ('model.learning_rates=(("(", 0.0), (".*", 1.0))', "holds '(', which is not a regex"),
  ('model.learning_rates=((".*", -1.0),)', "it must be pairs of a regex and a factor >= 0"),
  ('model.learning_rates=((".*", 1e999),)', "it must be pairs of a regex and a factor >= 0"),
  ('model.learning_rates=(".*", 1.0)', "it must be pairs of a regex and a factor >= 0"),
  ("model.learning_rates=()", "it must be pairs of a regex and a factor >= 0"),
  ("model.learning_rates=fast", "model.learning_rates is 'fast'; it must be pairs"),
]
RECIPES = {
  "absent.py": (None, "there is no file absent.py, and the recipes are internvl"),
  "absent": (None, "there is no file absent, and the recipes are internvl"),
  "qwen_bis10:small": (None, "a recipe has no form 'small': use configs/RECIPE.py"),
  "toy_bis10:toy": (None, "get_config() takes 0 positional arguments but 1 was given"),
  "typo.py": ("c.selection.fracton = 0.1", "selection.fracton: unknown key; the nearest is"),
  "new_key.py": ("c.mine = 1", "config.mine: unknown key; the nearest is config."),
  "text.py": ("c.seed = 'one'", "text.py:4: TypeError: "),
  "syntax.py": ("c.seed = = 1", "SyntaxError: invalid syntax"),
  "returns_nothing.py": ("c = None", "returns NoneType: return the config"),
  "gone.py": ("del c.seed", "config.seed is missing"),
}


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
  """refused(*arguments) -> what the command said; nothing may be written."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("JAX_NUM_PROCESSES", "1")

  def written() -> list[pathlib.Path]:  # but Python's bytecode of a recipe
    return sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)

  def run(*arguments: str, lines: int = 3) -> str:
    before = written()
    done = command("bis_jax.main", f"--workdir={tmp_path}/run", *arguments)
    assert done.returncode == 1 and not done.stdout, done
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= lines, (
      done.stderr
    )
    assert written() == before
    return done.stderr

  return run


@pytest.mark.parametrize(("flag", "words"), FLAGS)
def test_a_wrong_value_is_a_sentence_before_any_work(refused, flag, words):
  more = [] if flag.startswith("corpus.cache") else ["--config.corpus.cache=cache"]
  said = refused("--config=toy_bis10", *more, f"--config.{flag}")
  assert words in said and flag.split("=")[0].split(".")[-1] in said


@pytest.mark.parametrize(("name", "line", "words"), [(k, *v) for k, v in RECIPES.items()])
def test_a_wrong_recipe_is_a_sentence(refused, tmp_path, name, line, words):
  if line:
    (tmp_path / name).write_text(
      f"from configs import common\ndef get_config():\n  c = common.get_config()\n  {line}\n  return c\n"
    )
  assert words in refused(f"--config={name}")


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> pathlib.Path:
  """Folders that stand for the released corpus, a tokenizer and a checkpoint, without weights."""
  folder = tmp_path_factory.mktemp("released")
  for name in ("annotations", "images", "benchmark"):
    (folder / name).mkdir()
  train_tokenizer(["Yes No Question: Process: one two three"] * 9, folder / "tokenizer")
  (folder / "checkpoint").mkdir()
  config = SIZES["3b"].to_hugging_face()
  (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
  save_file({"a": np.zeros(1, np.float32)}, folder / "checkpoint" / "model.safetensors")
  return folder


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["corpus.images=nowhere"], "config.corpus.images: nothing at"),
    (["model.checkpoint=nowhere"], "config.model.checkpoint: nothing at"),
    (["inputs.tokenizer={}/images"], "set config.inputs.tokenizer to the one of its weights"),
    ([], "text hidden_size is 2048, the model has 3584"),
    (["model.backbone=internvl"], "model.size is '7b'; it must be one of"),
    (
      ["model.backbone=internvl", "model.size=2.5-8b", "inputs.row_patches=28672"],
      "does not fit the model: name another one, or its backbone and size",
    ),
    (["labels.kind=truth"], "set corpus.name to"),
    (["pretrain.steps=5"], "but only the toy corpus has captions"),
  ],
)
def test_inputs_that_do_not_fit_are_a_sentence(refused, released, flags, words):
  places = {
    "corpus.annotations": "annotations",
    "corpus.images": "images",
    "evaluation.benchmark": "benchmark",
    "inputs.tokenizer": "tokenizer",
    "model.checkpoint": "checkpoint",
  }
  given = [f"--config.{key}={released / name}" for key, name in places.items()]
  more = [f"--config.{flag.format(released)}" for flag in flags]
  assert words in refused(
    "--config=qwen_bis10", "--config.corpus.cache=cache", *given, *more, lines=23
  )
