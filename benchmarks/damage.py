"""Damages every file of a folder in four ways, one at a time, and uses the folder each time.

    python -m benchmarks.damage [workdir] [cache]

A file is truncated, emptied, deleted or flipped in one byte. Nothing may end in a traceback, and no
result may change in silence: it stays equal, or a warning or a user's error names the damage. The
workdir is that of a tiny run, drawn and trained once. It is used by: restoring the model as `score`,
`serve`, `evaluate` and `export` do; resuming as `main` does, up to the restored state; reading the
scores, the run's line in a report, and what an export's card shows.
"""

import collections
import logging
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bis_jax.console import log
from bis_jax.corpus import shared
from bis_jax.corpus.preparation import prepare
from bis_jax.errors import UserError
from bis_jax.evaluation import score_files, visual_process_bench
from bis_jax.models import backbones
from bis_jax.models.processor import make_processor
from bis_jax.parallel.sharding import make_mesh
from bis_jax.reports import run_table
from bis_jax.run import stages
from bis_jax.scoring.restore import load_run, save_tokenizer
from bis_jax.settings.locations import locate
from bis_jax.settings.workdir import claim
from bis_jax.toy import drawing
from bis_jax.training import pretrain
from bis_jax.training.checkpoint import Checkpoints
from bis_jax.training.metrics import MetricWriter
from bis_jax.training.train_step import step_of
from configs import qwen_bis10

Use = Callable[[pathlib.Path], object]


def _flip(content: bytes, at: float) -> bytes:
  place = min(int(at * len(content)), len(content) - 1)
  return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


WAYS: dict[str, Callable[[bytes], bytes | None]] = {
  "truncated": lambda content: content[: len(content) // 2],
  "emptied": lambda content: b"",
  "deleted": lambda content: None,
  "flipped": lambda content: _flip(content, 0.5),
}


def sweep(folder: pathlib.Path, uses: dict[str, tuple[Use, tuple[str, ...]]]) -> list[str]:
  """Returns a line per fault; prints how many damaged uses ended how.

  `uses` are {name: (function of the folder that returns what it found, starts of the names of the
  files that it reads)}.
  """
  logging.getLogger("absl").setLevel("ERROR")
  warnings = _Warnings()
  log.addHandler(warnings)
  counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  faults = []
  with tempfile.TemporaryDirectory() as scratch:
    # Always at one path, as some results contain it.
    copy = pathlib.Path(scratch) / "folder"
    wanted = {}
    for name, (use, _) in uses.items():
      shutil.copytree(folder, copy)
      wanted[name] = use(copy)
      shutil.rmtree(copy)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    for path in names:
      for way, change in WAYS.items():
        changed = change((folder / path).read_bytes() or b"\0")
        for name, (use, reads) in uses.items():
          if not path.startswith(reads):
            continue
          shutil.copytree(folder, copy)
          (copy / path).unlink()
          if changed is not None:
            (copy / path).write_bytes(changed)
          warnings.texts.clear()
          try:
            same = _equal(use(copy), wanted[name])
            outcome = "equal" if same else "warned" if warnings.texts else "SILENT"
          except (UserError, OSError):
            outcome = "error with a remedy"
          except Exception as error:
            outcome = f"TRACEBACK {type(error).__name__}"
          counts[name][outcome] += 1
          if outcome.startswith(("SILENT", "TRACEBACK")):
            faults.append(f"{path} {way}, {name}: {outcome}")
          shutil.rmtree(copy, ignore_errors=True)
  log.removeHandler(warnings)
  for name, outcomes in counts.items():
    print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
  return faults


class _Warnings(logging.Handler):
  def __init__(self):
    super().__init__(logging.WARNING)
    self.texts: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.texts.append(record.getMessage())


def _equal(one: object, other: object) -> bool:
  one, other = jax.tree.leaves(one), jax.tree.leaves(other)
  return len(one) == len(other) and all(map(np.array_equal, one, other))


def tiny_config(cache: pathlib.Path) -> ConfigDict:
  c = qwen_bis10.get_config("toy")
  c.corpus.cache, c.corpus.workers = str(cache), 1
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 1000, 300, 24
  c.model.size, c.pretrain.steps, c.train.compile_cache = "tiny", 0, ""
  c.train.global_batch, c.train.steps, c.train.checkpoint_every, c.train.log_every = 8, 4, 2, 1
  c.model.learning_rates = [["visual.*", 0.0], [".*", 1.0]]
  c.evaluation.blank_images, c.evaluation.every, c.evaluation.dev_rollouts = False, 0, 4
  c.evaluation.page_items = 2
  return c.lock()


def workdir_uses(config: ConfigDict) -> dict[str, tuple[Use, tuple[str, ...]]]:
  where, mesh = locate(config), make_mesh(**config.mesh)
  processor = make_processor(config, where.tokenizer)
  corpus = stages.prepare_corpus(config, where)
  items = visual_process_bench.load(where.benchmark)
  model = backbones.model_config(config, len(processor.tokenizer))
  step = step_of(config, model, mesh, config.train.steps)

  def restore(folder: pathlib.Path) -> object:
    run = load_run(str(folder))
    ids = run.processor.prompt.encode_batch([("A <prm>?", ["One.", "Two."])], [[]], max_length=99)
    return run.params, run.step, run.config.to_json(), ids[0][0]

  def resume(folder: pathlib.Path) -> object:
    workdir = epath.Path(folder)
    claim(workdir, config)
    manifest = stages.select_rollouts(config, corpus, workdir / "manifest.json")
    save_tokenizer(processor.tokenizer, workdir)
    with Checkpoints(workdir, every=2, keep=2) as checkpoints:
      state = checkpoints.restore(step.state)
      frozen = checkpoints.restore_frozen(step.frozen, lambda: _frozen(config, step, processor))
    writer = MetricWriter(workdir, resume_step=int(state.step), write=True)
    writer.close()
    return state, frozen, manifest.digest, writer.history

  def scores(folder: pathlib.Path) -> object:
    held_out = score_files.read_held_out(str(folder / "held_out.jsonl"))
    return score_files.read_scores(str(folder / "scores.jsonl"), items), held_out.scores

  def report(folder: pathlib.Path) -> object:
    run = run_table.read_run(str(folder), "fixed_0.5", "accuracy")
    return run.strategy, run.fraction, run.seed, run.value, run.curve

  # The older checkpoint, checkpoints/2, is not read while the newest one is whole.
  model = ("config.json", "digests.json", "tokenizer/", "checkpoints/4/", "frozen/")
  return {
    "restore": (restore, model),
    "resume": (resume, (*model, "manifest.json", "metrics.jsonl")),
    "scores": (scores, ("scores.jsonl", "held_out.jsonl", "digests.json")),
    "report": (report, ("config.json", "evaluation.json", "metrics.jsonl", "digests.json")),
  }


def _frozen(config, step, processor):
  from bis_jax.training.train_state import first_params, split_trainable

  model = backbones.model_config(config, len(processor.tokenizer))
  shapes = step.state.params | step.frozen
  params = first_params(model, shapes, None, processor.prompt.special, config.seed)
  return split_trainable(params, step.factors)[1]


def workdir(cache: pathlib.Path) -> list[str]:
  config = tiny_config(cache / "cache")
  folder = cache / "run"
  stages.run(config, str(folder))
  return sweep(folder, workdir_uses(config))


def cache(scratch: pathlib.Path) -> list[str]:
  """A toy corpus, the corpus prepared from it, and the backbone pre-trained on it."""
  config = tiny_config(scratch)
  toy, whole = dict(rollouts=120, images=40, benchmark_items=18), scratch / "whole"

  def draw(folder: pathlib.Path) -> object:
    drawing.draw(folder / "toy", workers=1, **toy)
    return sorted(shared.digests_of(folder / "toy").items())

  def prepared(folder: pathlib.Path) -> object:
    images = folder / "toy/images"
    corpus = prepare(folder / "toy/annotations", images, folder / "corpus", workers=1)
    rollouts = [str(corpus.rollout(i)) for i in range(len(corpus))]
    pictures = [corpus.image(i) for i in range(len(corpus.image_sizes))]
    return rollouts, pictures, hash(corpus.score_table.mc_scores().tobytes()), corpus.digest

  def backbone(folder: pathlib.Path) -> object:
    pretrain.pretrain(config, folder / "toy", folder / "backbone")
    return sorted(shared.digests_of(folder / "backbone").items())

  with config.unlocked():
    config.pretrain.steps = 2
  for make in (draw, prepared, backbone):
    make(scratch / "first")
  shutil.copytree(scratch / "first", whole)
  pretrain._pretrain = lambda config, drawn, out: shutil.copytree(  # in less than its 20 s
    whole / "backbone", out, dirs_exist_ok=True
  )
  kinds = ("annotations/bars_sum", "benchmark/test", "images/bars_sum/000000", "tokenizer/")
  drawn = (*kinds, "captions.jsonl", "truth.jsonl", "digest.json")
  return sweep(
    scratch / "first",
    {
      "draw": (draw, tuple(f"toy/{name}" for name in drawn)),
      "prepare": (prepared, ("corpus/",)),
      "pretrain": (backbone, ("backbone/",)),
    },
  )


def main() -> None:
  parts = {"workdir": workdir, "cache": cache}
  faults = []
  for name in sys.argv[1:] or parts:
    with tempfile.TemporaryDirectory() as scratch:
      faults += parts[name](pathlib.Path(scratch))
  print("\n".join(faults) or "no traceback, and no silent change of a result")
  sys.exit(bool(faults))


if __name__ == "__main__":
  main()
