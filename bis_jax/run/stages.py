"""One run, from raw annotations to the evaluated model and its page.

raw records --prepare--> corpus --select--> manifest --measure, plan--> rows
rows --train--> checkpoints --score, evaluate--> evaluation.json, index.html, held_out/items.html
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax import files, storage
from bis_jax.compilation import program_cache
from bis_jax.console import log
from bis_jax.corpus.corpus import Corpus
from bis_jax.corpus.preparation import prepare
from bis_jax.errors import UserError
from bis_jax.evaluation import benchmarks, score_files, step_evaluation, visual_process_bench
from bis_jax.evaluation.visual_process_bench import BenchmarkItem
from bis_jax.hub import weights
from bis_jax.inputs import pipeline
from bis_jax.models import backbones, learning_rates
from bis_jax.models.attention import check_backend
from bis_jax.models.backbone import Processor
from bis_jax.models.chip_settings import run_mesh
from bis_jax.models.model_config import ModelConfig
from bis_jax.models.processor import make_processor
from bis_jax.parallel import ownership, processes
from bis_jax.parallel.sharding import batch_share
from bis_jax.reports import run_page
from bis_jax.run.evaluator import Evaluator
from bis_jax.run.held_out import HeldOut, draw
from bis_jax.scoring import step_scorer
from bis_jax.scoring.benchmark_examples import benchmark_examples
from bis_jax.scoring.restore import save_tokenizer
from bis_jax.selection import bis, strategies
from bis_jax.selection.manifest import Manifest, ManifestError
from bis_jax.selection.rule import select
from bis_jax.settings import exported
from bis_jax.settings.config_check import check
from bis_jax.settings.locations import Locations, locate, require
from bis_jax.settings.workdir import OWNER, claim, release
from bis_jax.toy import drawing
from bis_jax.training import loop, pretrain, trackers, train_state
from bis_jax.training.examples import RolloutExamples


def run(config: ConfigDict, folder: str) -> dict[str, Any]:
  """Executes or resumes the run in a workdir and returns the content of its evaluation.json.

  Raises UserError or OSError if the config, the workdir or the data cannot be used, or another
  process uses the workdir, and Preempted if training received a stop signal and saved everything.
  """
  check(config)
  check_backend(config.model.attention, jax.default_backend())
  trackers.check(config)
  mesh, workdir = run_mesh(config), files.absolute(folder)
  if config.optim.on_host:
    train_state.check_host_memory(mesh)
  if storage.is_url(workdir):
    storage.require_bucket(workdir)
  locations = require(config, locate(config))
  processes.require_shared(workdir, "--workdir")
  processes.require_shared(locations.prepared.parent, "--config.corpus.cache")
  new = not (workdir / "config.json").exists()
  processor = check_inputs(config, locations, mesh) if new else None
  if locations.programs:
    program_cache.use(locations.programs)
  alone = ownership.owned(workdir / OWNER, f"--workdir={folder}")
  with alone if processes.is_first() else contextlib.nullcontext():
    processes.first_makes(workdir / "config.json", lambda: claim(workdir, config))
    claim(workdir, config)  # on every process: each checks its own config against the first one's
    try:
      return _run(config, locations, mesh, workdir, processor)
    except UserError:
      if new and processes.is_first():
        release(workdir)
      raise


def _run(
  config: ConfigDict,
  locations: Locations,
  mesh: Mesh,
  workdir: epath.Path,
  processor: Processor | None,
) -> dict[str, Any]:
  log.info(
    "%d %s devices, %d processes", len(jax.devices()), jax.default_backend(), jax.process_count()
  )

  corpus = prepare_corpus(config, locations)
  manifest = select_rollouts(config, corpus, workdir / "manifest.json")
  processor = processor or make_processor(config, locations.tokenizer)
  if processes.is_first():
    save_tokenizer(processor.tokenizer, workdir)
  marker = processor.prompt.special.prm
  model_config = backbones.model_config(config, len(processor.tokenizer), marker)
  _, shapes = backbones.shapes(model_config)
  log.info(learning_rates.summary(config, shapes))
  evaluator = make_evaluator(config, locations, corpus, manifest, processor, mesh, model_config)
  examples = RolloutExamples(corpus, manifest.rollout_indices(corpus), config)
  trained = loop.train(
    config,
    workdir,
    mesh,
    model_config,
    lambda: initial_checkpoint(config, locations),
    processor.prompt.special,
    examples,
    training_batches(config, examples, processor, mesh),
    evaluator.while_training if evaluator else None,
  )
  if evaluator is None:
    return {}
  return evaluate(config, workdir, trained, evaluator, corpus, manifest)


def check_inputs(config: ConfigDict, locations: Locations, mesh: Mesh) -> Processor | None:
  """Raises UserError if strategy, tokenizer, checkpoint or rows of a new run do not fit its config.

  Returns the processor, None if its tokenizer is drawn with the corpus.
  """
  strategies.find(config.selection.strategy)
  train_state.check_rows(config.inputs.row_multiple, config.train.accumulate or 1, mesh)
  if locations.toy and not config.inputs.tokenizer:
    return None
  processor = make_processor(config, locations.tokenizer)
  model_config = backbones.model_config(config, len(processor.tokenizer))
  if locations.checkpoint:
    _, shapes = backbones.shapes(dataclasses.replace(model_config, adaptation=None))
    folder = weights.find_checkpoint(locations.checkpoint)
    weights.check(folder, model_config, shapes, processor.prompt.special.prm)
    for line in exported.differences(folder, config):
      log.warning("%s", line)
  return processor


def prepare_corpus(config: ConfigDict, locations: Locations) -> Corpus:
  # The first process prepares the corpus while the others wait.
  def make() -> None:
    if locations.toy:
      drawing.draw(locations.toy, workers=config.corpus.workers, **config.corpus.toy)
    prepare(
      locations.annotations,
      locations.images,
      locations.prepared,
      format=config.corpus.format,
      agreement=config.corpus.agreement,
      max_rejected_fraction=config.corpus.max_rejected_fraction,
      workers=config.corpus.workers,
    )

  processes.first_makes(locations.prepared, make)
  return Corpus.open(locations.prepared)


def initial_checkpoint(config: ConfigDict, locations: Locations) -> epath.Path | None:
  """Returns the folder of the weights that training starts from; None: random ones."""
  # If the config asks for pre-training, the first process does it while the others wait.
  folder, toy = pretrain.base_folder(config, locations), locations.toy
  if folder and toy and not locations.checkpoint:
    processes.first_makes(folder, lambda: pretrain.pretrain(config, toy, folder))
  return folder


def select_rollouts(config: ConfigDict, corpus: Corpus, path: epath.Path) -> Manifest:
  """Selects rollouts and writes the manifest to `path`.

  Raises ManifestError if `path` holds the manifest of another corpus or of other parameters.
  """
  s = config.selection
  manifest = select(
    corpus.score_table,
    devices=True,
    strategy=s.strategy,
    fraction=s.fraction,
    alpha=s.alpha,
    reliability_if_no_positive=s.reliability_if_no_positive,
    scope="per_source" if s.per_source else "global",
    seed=config.seed,
    tau=config.corpus.tau,
    unmeasured=config.corpus.unmeasured,
  )
  if processes.is_first():
    if not path.exists():
      manifest.save(path)
      files.note_digests(path)
    elif Manifest.load(path).digest != manifest.digest:
      raise ManifestError(
        f"{path} is of another selection than this config and corpus make: give this run a "
        "--workdir of its own"
      )
  eligible = sum(source.scorable for source in manifest.sources)
  log.info("%s selects %d of %d rollouts", s.strategy, len(manifest), eligible)
  return manifest


def training_batches(
  config: ConfigDict, examples: pipeline.Examples, processor: Processor, mesh: Mesh
) -> pipeline.BatchIterator:
  inputs = config.inputs
  measured = pipeline.measure(
    examples,
    processor.prompt,
    processor.images,
    max_length=inputs.max_length,
    progress=True,
    share=(jax.process_index(), jax.process_count()),
    gather=functools.partial(processes.gather, "measured"),
  )
  inputs = measured.fitted(inputs)
  layout, saved = measured.layout(inputs)
  plan = measured.plan_rows(inputs, rows=layout, seed=config.seed, epochs=config.train.epochs)
  rows = train_state.rows_per_step(
    len(plan.examples) / len(plan), config.train, inputs.row_multiple
  )
  train_state.check_rows(rows, config.train.accumulate or 1, mesh)
  log.info(
    "%d rollouts in %d epochs: %d rows of %d tokens and %d patches, of which %.1f %% and %.1f %% are "
    "padding; %d rows per step; %d rollouts lose trailing steps, %d do not fit a row",
    len(examples),
    config.train.epochs,
    len(plan),
    *layout.budgets[:2],
    *(100 * plan.padding[:2]),
    rows,
    np.count_nonzero(measured.dropped_steps),
    len(plan.too_long),
  )
  if inputs.row_streams:
    log.info(
      "shared prefixes: %s, %.0f %% less to compute than without",
      "rows of {} tokens of prefixes and {} streams of {}".format(
        layout.prefix_tokens, *layout.streams
      )
      if layout.streams[0]
      else "not used; the best rows with streams have",
      100 * saved,
    )
  return pipeline.BatchIterator(
    measured,
    plan,
    rows_per_batch=rows,
    share=batch_share(mesh),
    workers=inputs.workers,
    prefetch=inputs.prefetch,
  )


def make_evaluator(
  config: ConfigDict,
  locations: Locations,
  corpus: Corpus,
  manifest: Manifest,
  processor: Processor,
  mesh: Mesh,
  model_config: ModelConfig,
) -> Evaluator | None:
  """Returns the evaluator of the run, or None for a run without a benchmark.

  Raises UnscoredStepError if an item of the benchmark is too long.
  """
  if locations.benchmark is None:
    return None
  selected, count = manifest.rollout_indices(corpus), config.evaluation.dev_rollouts
  indices = draw(corpus, selected, count, config.seed)
  if len(indices) < count:
    log.info(
      "%d of %d rollouts held out: the selection keeps all others%s",
      len(indices),
      count,
      "" if len(indices) else "; there is no threshold tuned_on_dev",
    )
  benchmark = benchmarks.find(str(locations.benchmark))
  items = benchmark.items
  examples = benchmark_examples(items, config.evaluation.images)
  step_scorer.check_lengths(examples, processor, config.inputs)  # before training, not after it
  visual_process_bench.check_images(items)
  graph, _ = backbones.structure(model_config, mesh)
  return Evaluator(
    config.evaluation,
    benchmark,
    HeldOut(corpus, indices, config) if len(indices) else None,
    step_scorer.Scorer(
      processor,
      config.inputs,
      mesh,
      graph,
      params={},
      batch_rows=config.evaluation.batch_rows,
      options=config.train.compiler_options,
    ),
  )


def evaluate(
  config: ConfigDict,
  workdir: epath.Path,
  trained: loop.Trained,
  evaluator: Evaluator,
  corpus: Corpus,
  manifest: Manifest,
) -> dict[str, Any]:
  """Scores the benchmark and the held-out rollouts; returns the content of evaluation.json.

  Writes evaluation.json, scores.jsonl and index.html, and for held-out rollouts held_out.jsonl and
  held_out/items.html.
  """
  items, held_out = evaluator.items, evaluator.held_out
  scores = evaluator.score(trained.params)
  held_out_scores = evaluator.score_held_out(trained.params)
  evaluation = step_evaluation.evaluate(
    items,
    scores,
    dev=held_out.scored_steps(held_out_scores) if held_out and held_out_scores else None,
  )
  evaluation["published"] = benchmarks.measures(evaluator.kind, evaluation)
  if config.evaluation.blank_images:
    blank = evaluator.score(trained.params, blank=True)
    evaluation["blank_images"] = step_evaluation.without_images(items, scores, blank)
  if processes.is_first():
    score_files.write_scores(workdir / "scores.jsonl", scores)
    if held_out and held_out_scores:
      held_out.write(workdir, held_out_scores)
    files.write_json(workdir / "evaluation.json", evaluation)
    written = ("scores.jsonl", "held_out.jsonl", "evaluation.json")
    files.note_digests(*(workdir / name for name in written if (workdir / name).exists()))
    write_page(config, workdir, items, scores, evaluation, trained.history, corpus, manifest)
    _print_summary(workdir, evaluation)
  return evaluation


def write_page(
  config: ConfigDict,
  workdir: epath.Path,
  items: list[BenchmarkItem],
  scores: list[np.ndarray],
  evaluation: dict[str, Any],
  history: list[dict[str, float]],
  corpus: Corpus,
  manifest: Manifest,
) -> None:
  s, table = config.selection, corpus.score_table
  of_table = table.statistics(config.corpus.tau, config.corpus.unmeasured)
  links = {"Held-out rollouts with their MC scores": "held_out/items.html"}
  run_page.write_page(
    str(workdir),
    title=f"{workdir.name}: {s.strategy}, {s.fraction:.0%} of the rollouts",
    items=items,
    scores=scores,
    evaluation=evaluation,
    history=history,
    selection=(
      bis.mixture(of_table.n, of_table.n_pos),
      bis.reliability(of_table.n_pos, of_table.score_sum, s.reliability_if_no_positive),
      np.isin(table.rollout, manifest.rollout_indices(corpus)),
    ),
    alpha=s.alpha if s.strategy == "bis" else None,
    shown_items=config.evaluation.page_items,
    links=links if "tuned_on_dev" in evaluation["thresholds"] else None,
  )


def _print_summary(workdir: epath.Path, evaluation: dict[str, Any]) -> None:
  for name, block in evaluation["thresholds"].items():
    print(
      f"{name:14} threshold {block['threshold']:.4f}  macro_f1_pooled {block['macro_f1_pooled']:.4f}"
      f"  overall_source_weighted {block['overall_source_weighted']:.4f}"
    )
  if blank := evaluation.get("blank_images"):
    print(f"blank images   macro_f1_pooled {blank['fixed_0.5']['macro_f1_pooled']:.4f} at 0.5")
  print(f"see {workdir / 'index.html'}")
