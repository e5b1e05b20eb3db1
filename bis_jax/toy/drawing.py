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
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator
from multiprocessing.pool import Pool
from typing import Any

from bis_jax import files
from bis_jax.console import ProgressBar, log
from bis_jax.toy import records, tokenizer
from bis_jax.toy.questions import SOURCES
from bis_jax.toy.records import Groups, Knobs

_IMAGE_PREFIX = "VisualPRM400K-v1.1-Raw/"
_GROUPS_PER_TASK = 500
# Increase it if the same settings draw other bytes: cached corpora and backbones are then made anew.
VERSION = 1


def draw(out_dir: str | os.PathLike, *, workers: int = 0, **knobs: Any) -> pathlib.Path:
  """Draws the corpus into `out_dir` and returns that folder; reuses an undamaged one.

    draw("corpus", rollouts=3000, n_mc=4)

  `knobs` are the fields of `Knobs`. The number of `workers` (processes; 0: one per core) does not
  change what is written. Raises ValueError if an argument is out of range, and FileExistsError if
  `out_dir` was not drawn from these settings.
  """
  settings = Knobs(**knobs)
  out = pathlib.Path(out_dir)
  identity = {"knobs": dataclasses.asdict(settings), "version": VERSION}
  if out.exists():
    damaged = _damaged_file(out, identity)
    if damaged is None:
      log.info("reusing the toy corpus in %s: it was drawn from the same settings", out)
      return out
    log.warning("%s is damaged: drawing the toy corpus again", damaged)
  with files.new_folder(out, replace=out.exists()) as folder:
    part = pathlib.Path(folder)
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with context.Pool(workers or os.cpu_count()) as pool:
      _draw_corpus(pool, part, settings)
      _draw_benchmark(pool, part, settings)
    drawn = sorted(path for path in part.rglob("*") if path.is_file())
    digests = {path.relative_to(part).as_posix(): _digest(path) for path in drawn}
    files.write_json(part / "digest.json", identity | {"files": digests})
  return out


def read_truth(drawn: pathlib.Path) -> dict[tuple[str, int], list[int]]:
  """Returns, by (source, line), for every step of a drawn corpus whether it is correct: 1 or 0."""
  lines = files.read_jsonl(drawn / "truth.jsonl")
  return {(pathlib.PurePath(a["file"]).stem, a["line"]): a["truth"] for _, a in lines}


def _damaged_file(out: pathlib.Path, identity: dict[str, Any]) -> pathlib.Path | None:
  """Returns a file that is not as it was drawn, or None.

  Raises FileExistsError if `out` was not drawn from `identity`.
  """
  path = out / "digest.json"
  held = json.loads(path.read_text()) if path.is_file() else {}
  digests = held.pop("files", {})  # none in corpora of earlier versions
  if held != identity:
    raise FileExistsError(
      f"{out} holds {held or 'something else'}, not the corpus of {identity}: "
      "delete it or name another folder"
    )
  return next(
    (out / name for name, digest in digests.items() if _digest(out / name) != digest), None
  )


def _digest(path: pathlib.Path) -> str:
  return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.is_file() else ""


def _draw_corpus(pool: Pool, part: pathlib.Path, knobs: Knobs) -> None:
  tasks = list(_corpus_tasks(knobs, part))
  work = functools.partial(records.draw_rollouts, knobs=knobs)
  (part / "annotations").mkdir()
  texts: list[str] = []
  for groups, drawn in zip(
    ProgressBar("draw", len(tasks), iterable=tasks), pool.imap(work, tasks), strict=True
  ):
    _append(part / "annotations" / f"{SOURCES[groups.source].name}.jsonl", drawn.records)
    _append(part / "truth.jsonl", drawn.truth)
    _append(part / "captions.jsonl", drawn.captions)
    texts += drawn.texts
  tokenizer.train_tokenizer(texts, part / "tokenizer")


def _draw_benchmark(pool: Pool, part: pathlib.Path, knobs: Knobs) -> None:
  (part / "benchmark").mkdir()
  for items in pool.imap(records.draw_benchmark, _benchmark_tasks(knobs, part)):
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
      )


def _benchmark_tasks(knobs: Knobs, part: pathlib.Path) -> Iterator[Groups]:
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
    )


def _shares(total: int) -> list[int]:
  """Returns how the sources share `total`: whole numbers that sum to it."""
  ends = [round(total * s) for s in itertools.accumulate(source.share for source in SOURCES)]
  return [end - start for start, end in itertools.pairwise([0, *ends])]
