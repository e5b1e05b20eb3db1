"""One run, from raw annotations to the evaluated model and its page.

raw records --prepare--> corpus --select--> manifest --measure, plan--> rows
rows --train--> checkpoints --score, evaluate--> evaluation.json, index.html, held_out/items.html
"""

import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bis_jax import files
from bis_jax.console import log
from bis_jax.corpus.corpus import Corpus
from bis_jax.corpus.preparation import prepare
from bis_jax.corpus.rejections import CorpusError
from bis_jax.corpus.score_table import ScoreTable, ScoreTableError
from bis_jax.evaluation import score_files, step_evaluation, visual_process_bench
from bis_jax.evaluation.visual_process_bench import BenchmarkItem
from bis_jax.hub import weights
from bis_jax.inputs import pipeline
from bis_jax.models import backbones
from bis_jax.models.attention import BackendError, check_backend
from bis_jax.models.backbone import Processor
from bis_jax.models.param_tree import Params
from bis_jax.models.processor import make_processor
from bis_jax.parallel import processes
from bis_jax.parallel.sharding import MeshError, batch_share, make_mesh
from bis_jax.reports import run_page
from bis_jax.run import held_out
from bis_jax.run.evaluator import Evaluator
from bis_jax.scoring import step_scorer
from bis_jax.scoring.benchmark_examples import benchmark_examples
from bis_jax.scoring.restore import save_tokenizer
from bis_jax.selection import bis
from bis_jax.selection.distributed import select
from bis_jax.selection.manifest import Manifest, ManifestError
from bis_jax.settings import locations, workdir
from bis_jax.settings.config_check import ConfigError, check
from bis_jax.toy import drawing
from bis_jax.training import loop, pretrain, train_state
from bis_jax.training.examples import RolloutExamples

# Errors that are the input's and not the program's: shown as a message, without a traceback.
EXPECTED_ERRORS = (
  ConfigError,
  CorpusError,
  ManifestError,
  ScoreTableError,
  FileExistsError,
  MeshError,
  processes.DistributedError,
  locations.MissingInputError,
  pipeline.InputError,
  step_scorer.UnscoredStepError,
  loop.NonFiniteLossError,
  weights.WeightsError,
  workdir.WorkdirError,
  BackendError,
)


def run(config: ConfigDict, folder: str) -> dict[str, Any]:
  """Carries out a run in its workdir and returns the content of its evaluation.json.

  Raises:
    one of EXPECTED_ERRORS where the config, the workdir or the data cannot be used.
    Preempted: it was told to stop while it trained, and saved everything.
  """
  check(config)
  check_backend(config.model.attention, jax.default_backend())
  where = locations.require(config, locations.locate(config))
  if where.programs:  # programs that took a second to compile are read back the next time
    jax.config.update("jax_compilation_cache_dir", str(where.programs))
  place = files.absolute(folder)
  processes.first_makes(place / "config.json", lambda: workdir.claim(place, config))
  workdir.claim(place, config)
  log.info(
    "%d %s devices, %d processes", len(jax.devices()), jax.default_backend(), jax.process_count()
  )

  mesh = make_mesh(**config.mesh)
  corpus = prepare_corpus(config, where)
  manifest = select_rollouts(config, corpus, place / "manifest.json")
  processor = make_processor(config, where.tokenizer)
  if processes.is_first():
    save_tokenizer(processor.tokenizer, place)
  model_config = backbones.model_config(config, len(processor.tokenizer))
  evaluator = make_evaluator(config, where, corpus, manifest, processor, mesh, model_config)
  examples = RolloutExamples(corpus, manifest.rollout_indices(corpus), config)
  iterator = training_batches(config, examples, processor, mesh)
  trained = loop.train(
    config,
    place,
    mesh,
    model_config,
    lambda: base_checkpoint(config, where),
    processor.prompt.special,
    examples,
    iterator,
    evaluator.while_training if evaluator else None,
  )
  if evaluator is None:
    return {}
  return evaluate(config, place, trained, evaluator, corpus, manifest)


def prepare_corpus(config: ConfigDict, where: locations.Locations) -> Corpus:
  """Returns the prepared corpus, made by the first process while the others wait."""

  def make() -> None:
    if where.toy:
      drawing.draw(where.toy, workers=config.corpus.workers, **config.corpus.toy)
    prepare(
      where.annotations,
      where.images,
      where.prepared,
      tau=config.corpus.tau,
      unmeasured=config.corpus.unmeasured,
      max_rejected_fraction=config.corpus.max_rejected_fraction,
      workers=config.corpus.workers,
    )

  processes.first_makes(where.prepared, make)
  return Corpus.open(where.prepared)


def base_checkpoint(config: ConfigDict, where: locations.Locations) -> pathlib.Path | None:
  """Returns the folder of the weights that training starts from; None: random ones.

  Where the config asks for pre-training, the first process does it while the others wait.
  """
  if where.checkpoint:
    return weights.find_checkpoint(where.checkpoint)
  if not config.pretrain.steps:
    return None
  folder = pretrain.folder(config, where.toy)
  processes.first_makes(folder, lambda: pretrain.pretrain(config, where.toy, folder))
  return folder


def select_rollouts(config: ConfigDict, corpus: Corpus, path: epath.Path) -> Manifest:
  """Returns the manifest at `path`, selecting where there is none yet; jitted, on all devices.

  Raises:
    ManifestError: the one that is there was made from another corpus or with other parameters.
  """
  s = config.selection
  part = (jax.process_index(), jax.process_count())
  mine = ScoreTable.load(corpus.path / "score_table.npz", part=part)
  manifest = select(
    mine,
    strategy=s.strategy,
    fraction=s.fraction,
    alpha=s.alpha,
    reliability_if_no_positive=s.none_positive,
    scope="per_source" if s.per_source else "global",
    seed=config.seed,
  )
  if processes.is_first():
    if not path.exists():
      manifest.save(path)
    elif Manifest.load(path).digest != manifest.digest:
      raise ManifestError(
        f"{path} is of another selection than this config and corpus make: give this run a "
        "--workdir of its own"
      )
  ranked = sum(source.scorable for source in manifest.sources)
  log.info("%s keeps %d of %d rollouts", s.strategy, len(manifest), ranked)
  return manifest


def training_batches(
  config: ConfigDict, examples: pipeline.Examples, processor: Processor, mesh: Mesh
) -> pipeline.BatchIterator:
  """Returns this process's share of the run's global batches, planned to the last row."""
  inputs = config.inputs
  measured = pipeline.measure(
    examples,
    processor.prompt,
    processor.images,
    max_length=inputs.max_length,
    progress=True,
  )
  plan = measured.plan_rows(inputs, seed=config.seed, epochs=config.train.epochs)
  rows = train_state.rows_per_step(
    len(plan.examples) / len(plan), config.train, inputs.row_multiple
  )
  train_state.check_rows(rows, config.train.accumulate, mesh)
  log.info(
    "%d rollouts, %d epochs: %d rows of %d tokens and %d patches, %.1f %% and %.1f %% of them "
    "padding; %d rows a step; %d rollouts cut short, %d too long",
    len(examples),
    config.train.epochs,
    len(plan),
    inputs.row_tokens,
    inputs.row_patches,
    100 * plan.token_padding,
    100 * plan.patch_padding,
    rows,
    np.count_nonzero(measured.dropped_steps),
    len(plan.too_long),
  )
  return pipeline.batches(
    measured,
    plan,
    rows_per_batch=rows,
    share=batch_share(mesh),
    workers=inputs.workers,
    prefetch=inputs.prefetch,
  )


def make_evaluator(
  config: ConfigDict,
  where: locations.Locations,
  corpus: Corpus,
  manifest: Manifest,
  processor: Processor,
  mesh: Mesh,
  model_config: Any,
) -> Evaluator | None:
  """Returns what judges the run, None for a run without a benchmark.

  Raises:
    UnscoredStepError: an item of the benchmark is too long.
  """
  if where.benchmark is None:
    return None
  graph, _ = backbones.structure(model_config, mesh)

  def scorer_of(params: Params) -> step_scorer.Scorer:
    rows = config.evaluation.batch_rows
    return step_scorer.Scorer(processor, config.inputs, mesh, graph, params, batch_rows=rows)

  kept, count = manifest.rollout_indices(corpus), config.evaluation.dev_rollouts
  indices = held_out.draw(corpus, kept, count, config.seed)
  if len(indices) < count:
    log.info(
      "%d of %d rollouts held out: the selection keeps all others%s",
      len(indices),
      count,
      "" if len(indices) else "; there is no threshold tuned_on_dev",
    )
  dev = held_out.HeldOut(corpus, indices, config) if len(indices) else None
  items = visual_process_bench.load(where.benchmark)
  examples = benchmark_examples(items, config.evaluation.images)
  step_scorer.check_lengths(examples, processor, config.inputs)  # now, and not after the training
  return Evaluator(config.evaluation, items, dev, scorer_of)


def evaluate(
  config: ConfigDict,
  place: epath.Path,
  trained: loop.Trained,
  evaluator: Evaluator,
  corpus: Corpus,
  manifest: Manifest,
) -> dict[str, Any]:
  """Scores all there is to score and returns the content of evaluation.json.

  Writes evaluation.json, scores.jsonl, the page, and of held-out rollouts held_out.jsonl and
  held_out/items.html.
  """
  items, dev = evaluator.items, evaluator.held_out
  scores = evaluator.score(trained.params)
  dev_scores, scored = evaluator.score_held_out(trained.params) if dev else ([], [])
  evaluation = step_evaluation.evaluate(
    items, scores, dev=dev.scored_steps(dev_scores, scored) if scored else None
  )
  if config.evaluation.blank_images:
    blanked = evaluator.score(trained.params, blank=True)
    blanked = step_evaluation.evaluate(items, blanked, bootstrap_draws=0)
    evaluation["blank_images"] = blanked["thresholds"]
  if processes.is_first():
    score_files.write_scores(place / "scores.jsonl", scores)
    if scored:
      dev.write(place, dev_scores, scored)
    files.write_json(place / "evaluation.json", evaluation)
    write_page(config, place, items, scores, evaluation, trained.history, corpus, manifest)
    _print_summary(place, evaluation)
  return evaluation


def write_page(
  config: ConfigDict,
  place: epath.Path,
  items: list[BenchmarkItem],
  scores: list[np.ndarray],
  evaluation: dict[str, Any],
  history: list[dict[str, float]],
  corpus: Corpus,
  manifest: Manifest,
) -> None:
  """Writes the plots and index.html of a run."""
  table = corpus.score_table
  kept = np.zeros(len(table), bool)
  kept[np.isin(table.rollout, manifest.rollout_indices(corpus))] = True
  run_page.write_page(
    str(place),
    title=f"{place.name}: {config.selection.strategy}, {config.selection.fraction:.0%} of the rollouts",
    items=items,
    scores=scores,
    evaluation=evaluation,
    history=history,
    selection=(
      bis.mixture(table.n, table.n_pos),
      bis.reliability(table.n_pos, table.score_sum, config.selection.none_positive),
      kept,
    ),
    alpha=config.selection.alpha if config.selection.strategy == "bis" else None,
    shown_items=config.evaluation.page_items,
    links={"Held-out rollouts with their MC scores": "held_out/items.html"}
    if "tuned_on_dev" in evaluation["thresholds"]
    else None,
  )


def _print_summary(place: epath.Path, evaluation: dict[str, Any]) -> None:
  for name, block in evaluation["thresholds"].items():
    print(
      f"{name:14} threshold {block['threshold']:.4f}  macro_f1_pooled {block['macro_f1_pooled']:.4f}"
      f"  overall_source_weighted {block['overall_source_weighted']:.4f}"
    )
  if blank := evaluation.get("blank_images"):
    print(f"blank images   macro_f1_pooled {blank['fixed_0.5']['macro_f1_pooled']:.4f} at 0.5")
  print(f"see {place / 'index.html'}")
