"""The embedded corpus: drawn, not stored, in the layouts of the released data.

    out/annotations/rows_sum.jsonl ...   VisualPRM400K-v1.1-Raw, a file a source
    out/images/rows_sum/000000a.png ...  112 x 112 px
    out/benchmark/test.jsonl, images/    VisualProcessBench
    out/tokenizer/                       for transformers.AutoTokenizer
    out/truth.jsonl                      {"file", "line", "truth": [1 | 0, ...]}, a line a rollout
    out/captions.jsonl                   {"image": [...], "question", "sentences"}, a line a scene
    out/digest.json                      what it was drawn from

A rollout's steps look at one thing of the picture after another, note its value and keep a total.
A step is right when its note and its total are. Its MC score is measured, not made up: see
`toy_policy`. The benchmark's pictures are new, its policies slip more, and its labels are the
truth, 0 for a step that claims nothing.
"""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Iterator
from multiprocessing.pool import Pool

from bis_jax.console import ProgressBar, log
from bis_jax.toy import records, tokenizer
from bis_jax.toy.questions import SOURCES
from bis_jax.toy.records import Groups, Knobs

_IMAGE_PREFIX = "VisualPRM400K-v1.1-Raw/"
_GROUPS_A_RUN = 500
# Increase it when the same settings draw other bytes: cached corpora and backbones are made anew.
VERSION = 1


def draw(out_dir: str | os.PathLike, *, workers: int = 0, **knobs: float) -> pathlib.Path:
  """Draws the corpus into `out_dir` and returns that folder; reuses one that is the same.

    draw("corpus", rollouts=3000, n_mc=4)

  Args:
    out_dir: appears whole or not at all.
    workers: processes; 0: one a core. It does not change a byte of what is written.
    **knobs: the fields of `Knobs`.

  Raises:
    ValueError: an argument is out of range.
    FileExistsError: `out_dir` holds something else.
  """
  knobs = Knobs(**knobs)
  out = pathlib.Path(out_dir)
  identity = {"knobs": dataclasses.asdict(knobs), "version": VERSION}
  if out.exists():
    return _reuse(out, identity)
  part = out.with_name(out.name + ".part")
  shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
  part.mkdir(parents=True)
  context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
  with context.Pool(workers or os.cpu_count()) as pool:
    _draw_corpus(pool, part, knobs)
    _draw_benchmark(pool, part, knobs)
  (part / "digest.json").write_text(json.dumps(identity, indent=2) + "\n")
  part.rename(out)
  return out


def read_truth(drawn: pathlib.Path) -> dict[tuple[str, int], list[int]]:
  """Returns, by (source, line), for every step of a drawn corpus whether it is right: 1 or 0."""
  lines = map(json.loads, (drawn / "truth.jsonl").read_text().splitlines())
  return {(pathlib.PurePath(a["file"]).stem, a["line"]): a["truth"] for a in lines}


def _reuse(out: pathlib.Path, identity: dict) -> pathlib.Path:
  path = out / "digest.json"
  there = json.loads(path.read_text()) if path.is_file() else None
  if there != identity:
    raise FileExistsError(
      f"{out} holds {there or 'something else'}, not the corpus of {identity}: "
      "delete it or give another folder"
    )
  log.info("reusing the embedded corpus in %s: it was drawn from the same settings", out)
  return out


def _draw_corpus(pool: Pool, part: pathlib.Path, knobs: Knobs) -> None:
  runs = list(_corpus_runs(knobs, part))
  work = functools.partial(records.draw_rollouts, knobs=knobs)
  (part / "annotations").mkdir()
  texts: list[str] = []
  for groups, drawn in zip(
    ProgressBar("draw", len(runs), iterable=runs), pool.imap(work, runs), strict=True
  ):
    _append(part / "annotations" / f"{SOURCES[groups.source].name}.jsonl", drawn.records)
    _append(part / "truth.jsonl", drawn.truth)
    _append(part / "captions.jsonl", drawn.captions)
    texts += drawn.texts
  tokenizer.train_tokenizer(texts, part / "tokenizer")


def _draw_benchmark(pool: Pool, part: pathlib.Path, knobs: Knobs) -> None:
  (part / "benchmark").mkdir()
  for items in pool.imap(records.draw_benchmark, _benchmark_runs(knobs, part)):
    _append(part / "benchmark" / "test.jsonl", items)


def _append(path: pathlib.Path, data: bytes) -> None:
  with open(path, "ab") as file:
    file.write(data)


def _corpus_runs(knobs: Knobs, part: pathlib.Path) -> Iterator[Groups]:
  counts = zip(SOURCES, _shares(knobs.rollouts), _shares(knobs.images), strict=True)
  for source, (about, rollouts, images) in enumerate(counts):
    size = knobs.rollouts_a_group
    n_groups = -(-rollouts // size)
    for first in range(0, n_groups, _GROUPS_A_RUN):
      yield Groups(
        source=source,
        first=first,
        rollouts=min(rollouts - first * size, _GROUPS_A_RUN * size),
        rollouts_a_group=size,
        scenes=max(1, images // about.pictures),
        root=part / "images",
        folder=about.name,
        prefix=_IMAGE_PREFIX,
        seed=f"corpus {knobs.seed}",
      )


def _benchmark_runs(knobs: Knobs, part: pathlib.Path) -> Iterator[Groups]:
  for source, about in enumerate(SOURCES):
    first = knobs.benchmark_items * source // len(SOURCES)
    items = knobs.benchmark_items * (source + 1) // len(SOURCES) - first
    yield Groups(
      source=source,
      first=0,
      rollouts=items,
      rollouts_a_group=1,
      scenes=items,
      root=part / "benchmark" / "images",
      folder=f"{about.benchmark}/{about.name}",
      prefix="images/",
      seed=f"benchmark {knobs.seed}",
    )


def _shares(total: int) -> list[int]:
  """Returns how the sources share `total`: whole numbers that sum to it."""
  ends = [round(total * s) for s in itertools.accumulate(source.share for source in SOURCES)]
  return [end - start for start, end in itertools.pairwise([0, *ends])]
