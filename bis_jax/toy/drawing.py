"""The toy corpus: drawn, not stored, in the layouts of the released data.

    out/annotations/rows_sum.jsonl ...   VisualPRM400K-v1.1-Raw, one file per source
    out/images/rows_sum/000000a.png ...  112 x 112 px
    out/benchmark/test.jsonl, images/    VisualProcessBench
    out/tokenizer/                       for transformers.AutoTokenizer
    out/truth.jsonl                      {"file", "line", "truth": [1 | 0, ...]}, one line per rollout
    out/captions.jsonl                   {"image": [...], "question", "sentences"}, one per scene
    out/digest.json                      the settings it was drawn from, and a digest of every file

The steps of a rollout look at one panel of the picture after another, note its value and keep a
total. A step is correct if its note and its total are. Its MC score is measured by running the
policy on from it: see `policies`. The benchmark has pictures of its own and policies that slip more;
its labels are the truth, 0 for a step that claims nothing.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from bis_jax import files
from bis_jax.console import progress_bar
from bis_jax.corpus import shared
from bis_jax.corpus.workers import Workers
from bis_jax.toy import records, tokenizer
from bis_jax.toy.questions import SOURCES, Kinds
from bis_jax.toy.records import Groups, Knobs

_IMAGE_PREFIX = "VisualPRM400K-v1.1-Raw/"
_GROUPS_PER_TASK = 500
_CONTENTS = {
  *("annotations", "images", "benchmark", "tokenizer", "truth.jsonl", "captions.jsonl"),
  shared.RECORD,
}
# Increase it if the same settings draw other bytes: cached corpora and backbones are then made anew.
VERSION = 1


def draw(out_dir: epath.PathLike, *, workers: int = 0, **knobs: Any) -> epath.Path:
  """Draws the corpus into `out_dir` and returns that folder; reuses an undamaged one.

    draw("corpus", rollouts=3000, n_mc=4)

  `knobs` are the fields of `Knobs`. The number of `workers` (processes; 0: one per core) does not
  change what is written. Raises ValueError if an argument is out of range, and UserError if
  `out_dir` was not drawn from these settings.
  """
  settings = Knobs(**knobs)
  out = epath.Path(out_dir)

  def make(part: pathlib.Path) -> None:
    with Workers(workers) as pool:
      _draw_corpus(pool, part, settings)
      _draw_benchmark(pool, part, settings)

  identity = {"knobs": named(dataclasses.asdict(settings)), "version": VERSION}
  shared.made(out, "the toy corpus", identity, make, _CONTENTS)
  return out


def named(knobs: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings that name a corpus: corpora of earlier versions lack the last ones."""
  later = ("described", "kinds", "first_kind", "kind_exponent")
  return {name: value for name, value in knobs.items() if name not in later or value}


def read_truth(drawn: epath.Path) -> dict[tuple[str, int], list[int]]:
  """Returns, by (source, line), for every step of a drawn corpus whether it is correct: 1 or 0."""
  lines = files.read_jsonl(drawn / "truth.jsonl")
  return {(pathlib.PurePath(a["file"]).stem, a["line"]): a["truth"] for _, a in lines}


def _draw_corpus(pool: Workers, part: pathlib.Path, knobs: Knobs) -> None:
  tasks = list(_corpus_tasks(knobs, part))
  work = functools.partial(records.draw_rollouts, knobs=knobs)
  (part / "annotations").mkdir()
  texts: list[str] = []
  for groups, drawn in zip(
    progress_bar("draw", len(tasks), iterable=tasks), pool.imap(work, tasks), strict=True
  ):
    _append(part / "annotations" / f"{SOURCES[groups.source].name}.jsonl", drawn.records)
    _append(part / "truth.jsonl", drawn.truth)
    _append(part / "captions.jsonl", drawn.captions)
    texts += drawn.texts
  tokenizer.train_tokenizer(texts, part / "tokenizer")


def _draw_benchmark(pool: Workers, part: pathlib.Path, knobs: Knobs) -> None:
  (part / "benchmark").mkdir()
  for items in pool.imap(records.draw_benchmark, list(benchmark_groups(knobs, part))):
    _append(part / "benchmark" / "test.jsonl", items)


def _append(path: pathlib.Path, data: bytes) -> None:
  with open(path, "ab") as file:
    file.write(data)


def _corpus_tasks(knobs: Knobs, part: pathlib.Path) -> Iterator[Groups]:
  counts = zip(SOURCES, _shares(knobs.rollouts), _shares(knobs.images), strict=True)
  for source, (about, rollouts, images) in enumerate(counts):
    size = knobs.rollouts_per_group
    n_groups = -(-rollouts // size)
    for first in range(0, n_groups, _GROUPS_PER_TASK):
      yield Groups(
        source=source,
        first=first,
        rollouts=min(rollouts - first * size, _GROUPS_PER_TASK * size),
        rollouts_per_group=size,
        scenes=max(1, images // about.pictures),
        root=part / "images",
        folder=about.name,
        prefix=_IMAGE_PREFIX,
        seed=f"corpus {knobs.seed}",
        kinds=Kinds(knobs.first_kind, knobs.kinds, knobs.kind_exponent),
        described=knobs.described,
      )


def benchmark_groups(knobs: Knobs, part: pathlib.Path) -> Iterator[Groups]:
  """Yields the benchmark's groups in the order of its items, one item per group."""
  for source, about in enumerate(SOURCES):
    first = knobs.benchmark_items * source // len(SOURCES)
    items = knobs.benchmark_items * (source + 1) // len(SOURCES) - first
    yield Groups(
      source=source,
      first=0,
      rollouts=items,
      rollouts_per_group=1,
      scenes=items,
      root=part / "benchmark" / "images",
      folder=f"{about.benchmark}/{about.name}",
      prefix="images/",
      seed=f"benchmark {knobs.seed}",
      kinds=Kinds(knobs.first_kind, knobs.kinds),
      described=knobs.described,
    )


def _shares(total: int) -> list[int]:
  """Returns how the sources share `total`: whole numbers that sum to it."""
  ends = [round(total * s) for s in itertools.accumulate(source.share for source in SOURCES)]
  return [end - start for start, end in itertools.pairwise([0, *ends])]
