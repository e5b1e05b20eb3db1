"""The command that evaluates step scores, those of a checkpoint or of any other model.

    python -m bis_jax.evaluate --benchmark=DIR --scores=FILE --out=evaluation.json
    python -m bis_jax.evaluate --benchmark=DIR --checkpoint=RUN --out=evaluation.json
    python -m bis_jax.evaluate --benchmark=DIR1,DIR2 --checkpoint=RUN --out=evaluation.json --page=DIR
    python -m bis_jax.evaluate --benchmark=DIR --scores=FILE --baseline=FILE --out=comparison.json
    python -m bis_jax.evaluate --candidates=FILE --out=best_of_n.json --plot=best_of_n.png
    python -m bis_jax.evaluate --candidates=FILE --checkpoint=RUN --save_scores=FILE --out=best_of_n.json
    python -m bis_jax.evaluate --candidates=SAMPLE1.xlsx,SAMPLE2.xlsx --images_tsv=BENCHMARK.tsv \\
      --answers=math --checkpoint=RUN --save_scores=FILE --out=best_of_n.json

The first measures scores on VisualProcessBench, ProcessBench or PRMBench, the second computes them
with a reward model (workdir of a run, exported folder or hub id), the third on several benchmarks, the
fourth compares them with another run's, the others are Best-of-N, of scored candidates, of those to score, and of VLMEvalKit's results.
Other files are JSON lines, defined in `bis_jax/evaluation/score_files.py` and `best_of_n.py`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from absl import app, flags
from etils import epath

from bis_jax import files
from bis_jax.console import command
from bis_jax.errors import UserError
from bis_jax.evaluation import (
  benchmarks,
  best_of_n,
  score_files,
  step_evaluation,
  visual_process_bench,
)
from bis_jax.evaluation.visual_process_bench import MODES

if TYPE_CHECKING:  # imported where it is used: it needs JAX
  from bis_jax.scoring.step_scorer import Scorer

_BENCHMARK = flags.DEFINE_string(
  "benchmark", "", "benchmark folder, or dataset id on the hub; several: A,B"
)
_SCORES = flags.DEFINE_string(
  "scores", "", 'JSON lines {"index": i, "scores": [...]}; one file per benchmark'
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "workdir, exported folder or hub id of the model that scores"
)
_BASE = flags.DEFINE_string(
  "base", None, "base checkpoint of exported adapters, if not where adapter_config.json says"
)
_IMAGES = flags.DEFINE_enum(
  "images", "multi", MODES, "what --checkpoint sees of an item with several images"
)
_SAVE_SCORES = flags.DEFINE_string("save_scores", "", "file to write the scores of --checkpoint to")
_BASELINE = flags.DEFINE_string("baseline", "", "scores of another run to compare with")
_HELD_OUT = flags.DEFINE_string(
  "held_out", "", 'JSON lines {"scores", "labels", "data_source"} to tune a threshold on'
)
_CANDIDATES = flags.DEFINE_string(
  "candidates",
  "",
  "JSON lines of Best-of-N candidates, or VLMEvalKit's result files: A.xlsx,B.xlsx",
)
_ANSWERS = flags.DEFINE_enum(
  "answers", "text", best_of_n.WAYS, "compare the answers of candidates as text or as mathematics"
)
_IMAGES_TSV = flags.DEFINE_string(
  "images_tsv", "", "TSV file of the benchmark, with the images of VLMEvalKit's --candidates"
)
_MISSING = flags.DEFINE_enum(
  "missing", "error", best_of_n.MISSING, "treat a missing candidate as an error or as the worst"
)
_OUT = flags.DEFINE_string("out", "", "JSON file to write")
_PAGE = flags.DEFINE_string("page", "", "folder for plots and an index.html; default: none")
_PLOT = flags.DEFINE_string("plot", "", "PNG file for the Best-of-N curves; default: none")
_DRAWS = flags.DEFINE_integer(
  "bootstrap_draws", 1000, "bootstrap samples for intervals; 0: no intervals", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap", lower_bound=0)

_LISTS = ("benchmark", "scores", "save_scores")  # flags with a value per benchmark
_SHOWN = ("overall_source_weighted", "macro_f1_pooled", "f1_correct", "f1_error", "roc_auc")


def main(argv: list[str]) -> None:
  with command("evaluate", argv, "--scores=FILE"):
    scored = _CHECKPOINT.value and not _CANDIDATES.value
    if sum(map(bool, (_SCORES.value, scored, _CANDIDATES.value))) != 1:
      raise UserError(
        "give --scores=FILE or --checkpoint=WORKDIR with --benchmark=DIR, or --candidates=FILE"
      )
    if not (_BENCHMARK.value or _CANDIDATES.value):
      raise UserError("name the benchmark that was scored with --benchmark=DIR")
    if _CANDIDATES.value and bool(_CHECKPOINT.value) != bool(_SAVE_SCORES.value):
      raise UserError(
        "give --checkpoint=RUN to score --candidates and --save_scores=FILE for the scored ones together"
      )
    if _BASE.value and not _CHECKPOINT.value:
      raise UserError("--base is read only for adapters that --checkpoint names")
    if not _OUT.value:
      raise UserError("name the file to write with --out=FILE.json")
    if _IMAGES_TSV.value and not (_CANDIDATES.value and _CHECKPOINT.value):
      raise UserError("--images_tsv is read only for --candidates that a --checkpoint scores")
    outputs, inputs = (
      (_OUT, _PAGE, _PLOT, _SAVE_SCORES),
      (_SCORES, _BASELINE, _HELD_OUT, _IMAGES_TSV),
    )
    candidates = {f"--candidates, {path}": path for path in _CANDIDATES.value.split(",")}
    run = {
      f"the run's {name}": f"{_CHECKPOINT.value}/{name}" if _CHECKPOINT.value else None
      for name in ("config.json", "manifest.json", "metrics.jsonl")
    }
    files.refuse_overwriting(
      _named(*outputs),
      _named(*inputs) | candidates | run,
      _named(_BENCHMARK),
    )
    for name, path in _named(_OUT, _PLOT, _SAVE_SCORES).items():
      if files.absolute(path).is_dir():
        raise UserError(f"{name}={path} is a folder: name a file")
    files.write_json(_OUT.value, _best_of_n() if _CANDIDATES.value else _steps())
  print(f"wrote {_OUT.value}")


def _named(*of: flags.FlagHolder[str]) -> dict[str, str]:
  """Returns {"--flag": path}, of a flag with several paths "--flag, path" each."""
  found = {}
  for flag in of:
    paths = flag.value.split(",") if flag.name in _LISTS else [flag.value]
    several = {f"--{flag.name}, {path}": path for path in paths}
    found |= several if len(paths) > 1 else {f"--{flag.name}": flag.value}
  return {name: path for name, path in found.items() if path}


def _steps() -> dict:
  names = _BENCHMARK.value.split(",")
  found = [benchmarks.find(name) for name in names]
  scorer = None
  if _CHECKPOINT.value:
    # Here, because the evaluation of a score file needs neither JAX nor Transformers.
    from bis_jax.scoring import step_scorer

    for benchmark in found:
      visual_process_bench.check_images(benchmark.items)
    scorer = step_scorer.load(_CHECKPOINT.value, base=_BASE.value)
  if len(names) == 1:
    return _one(names[0], found[0], scorer, _SCORES.value, _SAVE_SCORES.value, _PAGE.value)
  scores, saved = _each(_SCORES, names), _each(_SAVE_SCORES, names)
  if _BASELINE.value or _HELD_OUT.value:
    raise UserError("--baseline and --held_out are of one benchmark: give one --benchmark")
  evaluations, pages = {}, {}
  for at, (name, benchmark) in enumerate(zip(names, found, strict=True)):
    page = f"{at}-{benchmark.kind}"
    pages[name] = page
    folder = str(files.absolute(_PAGE.value) / page) if _PAGE.value else ""
    print(f"{benchmark.kind}, {name}:")
    evaluations[name] = _one(name, benchmark, scorer, scores[at], saved[at], folder)
  if _PAGE.value:
    from bis_jax.reports import benchmarks_page  # here, as for one benchmark

    benchmarks_page.write(_PAGE.value, _SCORES.value or _CHECKPOINT.value, evaluations, pages)
  return {"benchmarks": evaluations}


def _each(flag: flags.FlagHolder[str], names: list[str]) -> list[str]:
  """Returns the files of a flag, one for each benchmark; "" for each if it is not given."""
  paths = flag.value.split(",") if flag.value else [""] * len(names)
  if len(paths) != len(names):
    raise UserError(f"--{flag.name} names {len(paths)} files for {len(names)} benchmarks")
  return paths


def _one(
  name: str,
  benchmark: benchmarks.Benchmark,
  scorer: "Scorer | None",
  path: str,
  saved: str,
  folder: str,
) -> dict:
  """Returns the evaluation of scores of a file, or of a model, on one benchmark."""
  items = benchmark.items
  known: Mapping[str, float] = {}
  if scorer is not None:
    from bis_jax.scoring.benchmark_examples import benchmark_examples

    scores = scorer.score(benchmark_examples(items, _IMAGES.value))
    known = scorer.thresholds
    if saved:
      score_files.write_scores(saved, scores)
  else:
    scores = score_files.read_scores(path, items)
  bootstrap = {"bootstrap_draws": _DRAWS.value, "seed": _SEED.value}
  if _BASELINE.value:
    baseline = score_files.read_scores(_BASELINE.value, items)
    comparison = step_evaluation.compare(items, scores, baseline, **bootstrap)
    for at in ("fixed_0.5", "tuned_on_test"):
      gain = comparison[at]["overall_source_weighted"]
      interval = [round(100 * end, 2) for end in gain["interval"] or ()]
      difference = f"overall_source_weighted {100 * gain['difference']:+.2f}"
      print(f"{at:14} {difference}  95 % interval {interval}")
    return comparison
  dev = score_files.read_held_out(_HELD_OUT.value) if _HELD_OUT.value else None
  evaluation = step_evaluation.evaluate(
    items, scores, dev=dev, tuned_on_dev=known.get("tuned_on_dev"), **bootstrap
  )
  evaluation["published"] = benchmarks.measures(benchmark.kind, evaluation)
  main = benchmarks.MAIN[benchmark.kind]
  for at, block in evaluation["thresholds"].items():
    shown = "  ".join(f"{metric} {_percent(block[metric])}" for metric in _SHOWN)
    own = f"{main} {_percent(evaluation['published'][at][main])}"
    print(f"{at:14} t = {block['threshold']:.4f}  {shown}  {own}")
  if folder:
    from bis_jax.reports import run_page  # here, because only a page needs Matplotlib

    title = f"{epath.Path(path or _CHECKPOINT.value).name} on {name}"
    run_page.write_page(folder, title=title, items=items, scores=scores, evaluation=evaluation)
  return evaluation


def _best_of_n() -> dict:
  from bis_jax.evaluation import vlmevalkit  # here, because steps do not need it

  paths = _CANDIDATES.value.split(",")
  results = vlmevalkit.are_results(paths)
  questions = vlmevalkit.read(paths) if results else best_of_n.read(_CANDIDATES.value)
  if _CHECKPOINT.value:
    from bis_jax.scoring import candidate_files  # here, as for a benchmark

    source = files.absolute(paths[0])
    candidate_files.add_scores(
      _CHECKPOINT.value, questions, source, _IMAGES_TSV.value, base=_BASE.value
    )
    candidate_files.write(_SAVE_SCORES.value, questions)
  candidates = best_of_n.check(_CANDIDATES.value, questions, _MISSING.value, _ANSWERS.value)
  result = best_of_n.evaluate(candidates, bootstrap_draws=_DRAWS.value, seed=_SEED.value)
  print(f"{'n':>14}  " + "  ".join(f"{n:>6}" for n in result["n"]))
  for name, line in result["curve"].items():
    print(f"{name:>14}  " + "  ".join(f"{100 * value:6.2f}" for value in line["values"]))
  if _PLOT.value:
    from bis_jax.reports import plots

    with files.replacing(_PLOT.value) as file:
      file.write(plots.best_of_n(result))
  return result


def _percent(value: float | None) -> str:
  return "none" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
  app.run(main)
