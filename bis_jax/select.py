"""Selects the rollouts to train on, and writes them for any trainer.

  python -m bis_jax.select --annotations=DIR_OR_ZIP --strategy=bis --fraction=0.1 --alpha=0.2 \\
      --out=subset.jsonl --report=subset_report --table=scores.npz

Annotation files have any format of docs/data_formats.md. Kept records are written
in file-name order and in the order of their file. Beside OUT are its manifest (which rollouts were
kept, by which rule) and, if any line was invalid, the rejected lines with their reasons.

With --table the statistics are saved, and the next selection from the same annotations reads them.
With a saved table, --format=manifest needs no annotations.

With --adaptive=16 the annotations are not complete yet: OUT lists the rollouts that can no longer be
kept, whatever the rest of their 16 continuations per step say.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import app, flags
from etils import epath

from bis_jax import files
from bis_jax.console import command
from bis_jax.corpus import formats
from bis_jax.corpus.rejections import REASONS, write_jsonl
from bis_jax.corpus.score_table import ScoreTable
from bis_jax.errors import UserError
from bis_jax.selection import strategies
from bis_jax.selection.rule import Rule, select

if TYPE_CHECKING:  # imported where they are used: that takes longer than a selection from a table
  from bis_jax.corpus.reading import AnnotationFile
  from bis_jax.corpus.scan import Scan

_ANNOTATIONS = flags.DEFINE_string(
  "annotations", "", "folder, zip or file of records, or a dataset id of the hub"
)
_ANNOTATIONS_FORMAT = flags.DEFINE_enum(
  "annotations_format",
  formats.AUTO,
  formats.NAMES,
  "of the records; auto: recognized by their keys",
)
_AGREEMENT = flags.DEFINE_string(
  "agreement", "", "key of a second MC score: steps of which one alone is positive are unmeasured"
)
_IMAGES = flags.DEFINE_string(
  "images", "", "image root; records whose image is missing are rejected"
)
_STRATEGY = flags.DEFINE_string(
  "strategy", "bis", f"{', '.join(strategies.STRATEGIES)}, or your own MODULE:FUNCTION"
)
_FRACTION = flags.DEFINE_float(
  "fraction", None, "share to keep, in (0, 1]; 0.1 if no count is given"
)
_COUNT = flags.DEFINE_integer("count", None, "number of rollouts to keep, instead of a fraction")
_ALPHA = flags.DEFINE_float("alpha", 0.2, "BIS smoothing (paper: 0.05 if fraction >= 0.25)")
_NONE_POSITIVE = flags.DEFINE_float(
  "none_positive", 1.0, "reliability of a rollout without a positive step, in [0, 1] (paper: 1)"
)
_ORDER = flags.DEFINE_string(
  "order", "strict", "strict: rank valid records only; paper: rank all, then drop invalid ones"
)
_SCOPE = flags.DEFINE_string(
  "scope", "per_source", "per_source (paper): fraction of every source; global: of all rollouts"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the random strategies")
_TAU = flags.DEFINE_float("tau", 0.0, "a step is positive if its MC score > tau")
_UNMEASURED = flags.DEFINE_enum(
  "unmeasured", "negative", ["negative", "ignore"], "how to treat steps without continuations"
)
_FORMAT = flags.DEFINE_enum(
  "format",
  "raw",
  ["raw", "conversations", "trl", "openrlhf", "dataset", "parquet", "manifest"],
  "form of OUT; dataset: a folder",
)
_ADAPTIVE = flags.DEFINE_integer(
  "adaptive",
  None,
  "continuations that each step gets in the end: OUT lists the rollouts whose sampling may stop",
  lower_bound=1,
)
_ENCODER = flags.DEFINE_string(
  "encoder",
  "",
  "for semdedup: Sentence Transformers model, or MODULE:FUNCTION, that embeds the texts",
)
_OUT = flags.DEFINE_string("out", "", "file or folder to write")
_TABLE = flags.DEFINE_string("table", "", "score table: read if it exists, written otherwise")
_REPORT = flags.DEFINE_string("report", "", "folder for a page about the selection")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace existing OUT and REPORT")
_WORKERS = flags.DEFINE_integer("workers", 0, "reader processes; 0: one per core")


def main(argv: list[str]) -> None:
  with command("select", argv, "--out=FILE"):
    run()


def run() -> None:
  # On an error no existing file was overwritten.
  rule = Rule(
    strategy=_STRATEGY.value,
    fraction=0.1 if _FRACTION.value is None and _COUNT.value is None else _FRACTION.value,
    count=_COUNT.value,
    alpha=_ALPHA.value,
    reliability_if_no_positive=_NONE_POSITIVE.value,
    order=_ORDER.value,
    scope=_SCOPE.value,
    seed=_SEED.value,
    tau=_TAU.value,
    unmeasured=_UNMEASURED.value,
  )
  if not _OUT.value:
    raise UserError("name the file to write with --out=FILE")
  out = files.absolute(_OUT.value)
  manifest_path = (
    out if _FORMAT.value == "manifest" or _ADAPTIVE.value else _beside_out("manifest.json")
  )
  report = files.absolute(_REPORT.value) if _REPORT.value else None
  files.refuse_overwriting(
    {
      "--out": _OUT.value,
      "--out's manifest": None if manifest_path == out else manifest_path,
      "--out's rejections": _beside_out("rejections.jsonl"),
      "--report": _REPORT.value,
      "--table": _TABLE.value,
    },
    {"--images": _IMAGES.value},
    {"--annotations": _ANNOTATIONS.value},
  )
  annotations = []
  if _ANNOTATIONS.value:
    from bis_jax.corpus.containers import sources

    annotations = sources(_ANNOTATIONS.value, _ANNOTATIONS_FORMAT.value, _AGREEMENT.value)
  needs_records = _FORMAT.value != "manifest" and not _ADAPTIVE.value
  if not annotations and (needs_records or not _TABLE.value):
    raise UserError(
      "name the annotations with --annotations=DIR_OR_ZIP; without them only a manifest can be "
      "made, from a score table: --format=manifest --table=FILE"
    )
  converted = any(not file.is_jsonl for file in annotations)
  images = _beside_out("images") if converted and needs_records else None
  outputs = [path for path in (out, manifest_path, report, images) if path]
  for path in outputs:
    if not _OVERWRITE.value and not _is_free(path):
      raise FileExistsError(f"{path} exists and was not changed: name another, or add --overwrite")
  with contextlib.ExitStack() as on_error:  # removes what is new, so that a retry is not refused
    for path in filter(_is_free, outputs):
      on_error.callback(_remove, path)
    table = score_table(annotations)
    if continuations := _ADAPTIVE.value:
      write_stopped(table, rule, continuations, out)
      on_error.pop_all()
      return
    manifest = select(table, **dataclasses.asdict(rule))
    if _FORMAT.value != "manifest":
      from bis_jax.selection import subset

      write, placeholders = subset.WRITERS[_FORMAT.value]
      manifest = dataclasses.replace(manifest, placeholders=placeholders)
      in_columns: set[str] = set()
      lines = subset.kept_lines(annotations, table, manifest)
      write(out, subset.noting_images(lines, in_columns) if converted else lines, manifest)
      if images and in_columns:
        subset.write_images(images, annotations, in_columns)
        print(f"{len(in_columns):,} images stored in columns are in {images}, an image root")
    manifest.save(manifest_path)
    if report:
      from bis_jax.reports import selection_page  # imports matplotlib

      selection_page.write_report(report, table, rule)
    on_error.pop_all()
  ranked = sum(source.scorable for source in manifest.sources)
  dropped = sum(source.dropped for source in manifest.sources)
  print(
    f"{rule.strategy} keeps {len(manifest):,} of {ranked:,} rollouts in {out}"
    + (f"; {dropped:,} more were ranked high enough but are invalid" if dropped else "")
  )
  if report:
    print(f"report: {report / 'index.html'}")


def write_stopped(table: ScoreTable, rule: Rule, continuations: int, out: epath.Path) -> None:
  """Writes {source: lines} of the rollouts that can't be kept, whatever their other continuations."""
  from bis_jax.selection import adaptive

  now = adaptive.standing(table, rule, continuations)
  stopped = ~now.open & (now.left > 0)
  lines = {
    name: table.line[rows][stopped[rows]].tolist()
    for name, rows in zip(table.source_names, table.spans(), strict=True)
  }
  files.write_json(out, {"continuations": continuations, "stopped": lines})
  print(
    f"{stopped.sum():,} of {len(table):,} rollouts can't be kept whatever the rest of their samples say: "
    f"{now.left[stopped].sum():,} of {now.left.sum():,} continuations need not be sampled. Listed in {out}"
  )


def _is_free(path: epath.Path) -> bool:
  return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _remove(path: epath.Path) -> None:
  if path.is_dir():
    path.rmtree(missing_ok=True)
  else:
    path.unlink(missing_ok=True)


def _beside_out(name: str) -> epath.Path:
  """Returns the path of a file that accompanies OUT: subset.jsonl -> subset.manifest.json."""
  out = files.absolute(_OUT.value)
  if _FORMAT.value == "dataset":
    return out / name
  return out.with_name(f"{out.name.removesuffix(out.suffix)}.{name}")


def score_table(annotations: "Sequence[AnnotationFile]") -> ScoreTable:
  """Returns the statistics of the annotations, read from --table if it exists.

  Raises UserError if the table has other inputs.
  """
  path = files.absolute(_TABLE.value) if _TABLE.value else None
  inputs = _fingerprint(annotations) if annotations else ""
  if path and path.exists():
    table = ScoreTable.load(path)
    if annotations and table.inputs != inputs:
      raise UserError(
        f"{path} is of other annotations or images than asked for: delete it, or name another --table"
      )
    print(f"read the statistics of {len(table):,} rollouts from {path}")
    return table
  if not annotations:
    raise FileNotFoundError(
      f"no score table at {_TABLE.value}: make one with --annotations=DIR_OR_ZIP"
    )
  from bis_jax.corpus.image_root import ImageRoot
  from bis_jax.corpus.scan import scan
  from bis_jax.selection import semdedup

  encode = _ENCODER.value and semdedup.encoder(_ENCODER.value)
  started = time.perf_counter()
  found = scan(
    _ANNOTATIONS.value,
    format=_ANNOTATIONS_FORMAT.value,
    agreement=_AGREEMENT.value,
    workers=_WORKERS.value,
  )
  if _IMAGES.value:
    found = found.reject_missing_images(ImageRoot(_IMAGES.value))
  seconds = time.perf_counter() - started
  print(f"read {found.records:,} lines of {len(annotations)} files in {seconds:.1f} s")
  if found.rejections:
    _write_rejections(found)
  table = dataclasses.replace(found.table(), inputs=inputs)
  if encode:
    lines = found.read_lines(np.arange(len(table)))
    table = dataclasses.replace(table, embedding=semdedup.embed(lines, encode))
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.save(path)
    print(f"saved the statistics in {path}")
  return table


def _fingerprint(annotations: "Sequence[AnnotationFile]") -> str:
  """Returns text that changes when an annotation file or the image root does."""
  stamps = [file.stamp for file in annotations]
  images = _IMAGES.value and str(files.absolute(_IMAGES.value))
  return json.dumps({"files": stamps, "images": images})


def _write_rejections(found: "Scan") -> None:
  path = _beside_out("rejections.jsonl")
  for reason, count in found.counts_by_reason().items():
    print(f"rejected {count:>8,}  {reason}: {REASONS[reason]}")
  path.parent.mkdir(parents=True, exist_ok=True)
  write_jsonl(found.rejections, path)
  print(f"{'the first' if found.unlisted else 'all'} rejected lines: {path}")


if __name__ == "__main__":
  app.run(main)
