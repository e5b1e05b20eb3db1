"""Selects the rollouts worth training on, and writes them for whoever trains.

  python -m bis_jax.select --annotations=DIR_OR_ZIP --strategy=bis --fraction=0.1 --alpha=0.2 \\
      --out=subset.jsonl --report=subset_report --table=scores.npz

Annotation files are those of VisualPRM400K-v1.1-Raw, plain, gzip or zstd. Kept records come in
file-name order and within a file in its order. Beside OUT stand OUT's manifest (what was kept and
why) and, if any line was bad, the rejected lines with their reasons.

With --table the statistics are kept, and the next selection from the same annotations takes them
from there. With --format=manifest, the annotations are not needed once the table is there.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from bis_jax.corpus.image_root import ImageRoot
from bis_jax.corpus.reading import AnnotationFile, annotation_files
from bis_jax.corpus.rejections import REASONS, BadRecord, counts_by_reason, write_jsonl
from bis_jax.corpus.scan import Scan, scan
from bis_jax.corpus.score_table import STRICT_OK, ScoreTable
from bis_jax.errors import UserError
from bis_jax.selection import subset
from bis_jax.selection.manifest import Manifest
from bis_jax.selection.rule import Rule, select
from bis_jax.selection.strategies import STRATEGIES

_ANNOTATIONS = flags.DEFINE_string("annotations", "", "folder of *.jsonl[.gz|.zst], or a zip of it")
_IMAGES = flags.DEFINE_string("images", "", "image root; records without their image are rejected")
_STRATEGY = flags.DEFINE_string("strategy", "bis", ", ".join(STRATEGIES))
_FRACTION = flags.DEFINE_float(
  "fraction", None, "share to keep, in (0, 1]; 0.1 if no count is given"
)
_COUNT = flags.DEFINE_integer("count", None, "rollouts to keep, instead of a fraction")
_ALPHA = flags.DEFINE_float("alpha", 0.2, "BIS smoothing (paper: 0.05 from fraction 0.25 on)")
_NONE_POSITIVE = flags.DEFINE_float(
  "none_positive", 1.0, "reliability of a rollout without a positive step, in [0, 1]; 1: paper"
)
_ORDER = flags.DEFINE_string("order", "strict", "strict: valid records only; paper: its builder's")
_SCOPE = flags.DEFINE_string("scope", "per_source", "per_source (paper) or global")
_SEED = flags.DEFINE_integer("seed", 0, "of the random strategies")
_TAU = flags.DEFINE_float("tau", 0.0, "a step is positive where its MC score > tau")
_UNMEASURED = flags.DEFINE_enum(
  "unmeasured", "negative", ["negative", "ignore"], "steps without continuations"
)
_FORMAT = flags.DEFINE_enum(
  "format", "raw", ["raw", "conversations", "dataset", "manifest"], "what OUT is; dataset: a folder"
)
_OUT = flags.DEFINE_string("out", "", "file or folder to write")
_TABLE = flags.DEFINE_string("table", "", "score table to keep, or to reuse if it is there")
_REPORT = flags.DEFINE_string("report", "", "folder for a page that shows the selection")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace OUT and REPORT if they are there")
_WORKERS = flags.DEFINE_integer("workers", 0, "processes that read; 0: one a core")


def main(argv: list[str]) -> None:
  """Selects; input that cannot be used ends it with a message and exit code 1."""
  if len(argv) > 1:
    sys.exit(f"select: what is {argv[1]!r}? Every argument is a flag, like --out=FILE")
  try:
    run()
  except (UserError, ValueError, OSError) as error:
    sys.exit(f"select: {error}")


def run() -> None:
  """Does what the flags say.

  Raises:
    ValueError, OSError: input that cannot be used; nothing was overwritten.
  """
  fraction = 0.1 if _FRACTION.value is None and _COUNT.value is None else _FRACTION.value
  rule = Rule(
    strategy=_STRATEGY.value,
    fraction=fraction,
    count=_COUNT.value,
    alpha=_ALPHA.value,
    none_positive=_NONE_POSITIVE.value,
    order=_ORDER.value,
    scope=_SCOPE.value,
    seed=_SEED.value,
  )
  if not _OUT.value:
    raise ValueError("say with --out=FILE where the selection goes")
  out = pathlib.Path(_OUT.value)
  report = pathlib.Path(_REPORT.value) if _REPORT.value else None
  files = annotation_files(_ANNOTATIONS.value) if _ANNOTATIONS.value else []
  if not files and (_FORMAT.value != "manifest" or not _TABLE.value):
    raise ValueError(
      "name the annotations with --annotations=DIR_OR_ZIP; without them only a manifest can be "
      "made, from a score table: --format=manifest --table=FILE"
    )
  for place in (out, beside(out, "manifest.json"), beside(out, "rejections.jsonl"), report):
    _make_room(place)
  table = score_table(files, beside(out, "rejections.jsonl"))
  manifest = select(table, **dataclasses.asdict(rule))
  _write(out, files, table, manifest)
  ranked = sum(source.scorable for source in manifest.sources)
  dropped = sum(source.dropped for source in manifest.sources)
  print(
    f"{rule.strategy} keeps {len(manifest):,} of {ranked:,} rollouts in {out}"
    + (f"; {dropped:,} more were ranked high enough but are invalid" if dropped else "")
  )
  if report:
    from bis_jax.reports import selection_page as page

    page.write_report(report, table, rule)
    print(f"report: {report / 'index.html'}")


def _make_room(place: pathlib.Path | None) -> None:
  """Makes the folder around a place to write; raises FileExistsError if it may not be replaced."""
  if place is None:
    return
  if not _OVERWRITE.value and place.exists() and (place.is_file() or any(place.iterdir())):
    raise FileExistsError(
      f"{place} is there already and was left as it is: name another place, or add --overwrite"
    )
  place.parent.mkdir(parents=True, exist_ok=True)


def beside(out: pathlib.Path, what: str) -> pathlib.Path:
  """Returns the place of a file that goes with OUT: subset.jsonl -> subset.manifest.json."""
  if _FORMAT.value == "dataset":
    return out / what
  return out.with_name(f"{out.name.removesuffix(out.suffix)}.{what}")


def score_table(files: Sequence[AnnotationFile], rejections: pathlib.Path) -> ScoreTable:
  """Returns the statistics of the annotations: from --table if it is there, else by reading them.

  Raises:
    ValueError: the table is there but was made from other inputs or with other settings.
  """
  path = pathlib.Path(_TABLE.value) if _TABLE.value else None
  inputs = _inputs(files) if files else ""
  if path and path.exists():
    table = ScoreTable.load(path)
    settings = (table.tau, table.unmeasured)
    if settings != (_TAU.value, _UNMEASURED.value) or (files and table.inputs != inputs):
      raise ValueError(
        f"{path} is of other annotations, images, tau or unmeasured than asked for (it has "
        f"tau={table.tau:g}, unmeasured={table.unmeasured}): delete it, or name another --table"
      )
    print(f"statistics of {len(table):,} rollouts from {path}")
    return table
  if not files:
    raise FileNotFoundError(f"no score table at {path}: make one with --annotations=DIR_OR_ZIP")
  started = time.perf_counter()
  found = scan(_ANNOTATIONS.value, workers=_WORKERS.value)
  if _IMAGES.value:
    found = with_images(found, ImageRoot(_IMAGES.value))
  print(
    f"read {found.records:,} lines of {len(files)} files in {time.perf_counter() - started:.1f} s"
  )
  _show_rejections(found, rejections)
  table = found.table(tau=_TAU.value, unmeasured=_UNMEASURED.value)
  table = dataclasses.replace(table, inputs=inputs)
  if path:
    table.save(path)
    print(f"statistics kept in {path}")
  return table


def _inputs(files: Sequence[AnnotationFile]) -> str:
  """Returns text that changes when an annotation file or the image root does."""
  stamps = [(file.name, file.size, file.path.stat().st_mtime_ns) for file in files]
  images = _IMAGES.value and str(pathlib.Path(_IMAGES.value).absolute())
  return json.dumps({"files": stamps, "images": images})


def with_images(found: Scan, root: ImageRoot) -> Scan:
  """Returns the scan without the strict rows whose image files are not there.

  Files are found by name and not decoded; `bis_jax.prepare` decodes them.
  """
  flags_, image_set = found.columns.flags, found.columns.image_set
  bad = {}
  for at in np.unique(image_set[flags_ & STRICT_OK != 0]).tolist():
    try:
      for reference in found.image_sets[at]:
        root.locate(reference)
    except BadRecord as error:
      bad[at] = (error.reason, error.detail)
  rows = np.flatnonzero((flags_ & STRICT_OK != 0) & np.isin(image_set, list(bad)))
  return found.reject(rows, [bad[at] for at in image_set[rows].tolist()])


def _show_rejections(found: Scan, path: pathlib.Path) -> None:
  for reason, count in counts_by_reason(found.rejections).items():
    print(f"rejected {count:>8,}  {reason}: {REASONS[reason]}")
  if found.rejections:
    path.parent.mkdir(parents=True, exist_ok=True)  # OUT itself where it is a dataset's folder
    write_jsonl(found.rejections, path)
    print(f"each of them: {path}")


def _write(
  out: pathlib.Path, files: Sequence[AnnotationFile], table: ScoreTable, manifest: Manifest
) -> None:
  """Writes OUT in its format, and the manifest beside it or in its folder."""
  if _FORMAT.value == "manifest":
    manifest.save(out)
    return
  lines = subset.kept_lines(files, table, manifest)
  if _FORMAT.value == "dataset":
    subset.write_dataset(out, lines, manifest)
    return
  if _FORMAT.value == "raw":
    subset.write_raw(out, lines)
  else:
    subset.write_conversations(out, lines, manifest)
  manifest.save(beside(out, "manifest.json"))


if __name__ == "__main__":
  app.run(main)
