"""Raw annotations and images -> a prepared corpus, whole or not at all."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bis_jax.corpus import records, tfds_builders
from bis_jax.corpus.beam_workers import BeamWorkers
from bis_jax.corpus.corpus import FORMAT, Corpus
from bis_jax.corpus.image_root import ImageRoot, image_size
from bis_jax.corpus.reading import AnnotationFile, annotation_files
from bis_jax.corpus.rejections import (
  REASONS,
  BadRecord,
  CorpusError,
  Rejected,
  counts_by_reason,
  write_jsonl,
)
from bis_jax.corpus.scan import Scan, scan_files
from bis_jax.corpus.score_table import STRICT_OK
from bis_jax.corpus.workers import ProgressBar, Workers

_SHARD_BYTES = 64 << 20  # of a shard's inputs, where an example counts as at least _EXAMPLE_BYTES
_EXAMPLE_BYTES = 8 << 10


class TooManyRejectedError(CorpusError):
  """More records were rejected than the run allows."""


def prepare(
  annotations: str | os.PathLike,
  images: str | os.PathLike,
  out: str | os.PathLike,
  *,
  tau: float = 0.0,
  unmeasured: str = "negative",
  max_rejected_fraction: float = 0.01,
  workers: int = 0,
  beam: Sequence[str] | None = None,
) -> Corpus:
  """Prepares a corpus in `out` and returns it; reuses one made from the same inputs.

  Args:
    annotations: a folder of JSON lines files (plain, gzip, zstd), or a zip of it.
    images: the image root, a folder or a zip; nothing outside it is read.
    out: folder of the corpus. A corpus of other inputs there is replaced.
    tau, unmeasured: see `score_table.ScoreTable`.
    max_rejected_fraction: of all records; with more rejected nothing is written but
      `OUT.rejections.jsonl`.
    workers: processes; 0 for one a core.
    beam: options of Apache Beam, which then does the work instead; [] runs it on this machine.

  Raises:
    TooManyRejectedError: see above.
    CorpusError: the inputs are not there or damaged, no record can be used, or `out` holds
      something else.
  """
  out = pathlib.Path(out)
  _clear_up(out)
  scratch = _mine(out, "beam")
  with Workers(workers) if beam is None else BeamWorkers(beam, scratch) as pool:
    return _prepare(
      tuple(annotation_files(annotations)),
      ImageRoot(images),
      out,
      {"format": FORMAT, "tau": tau, "unmeasured": unmeasured},
      max_rejected_fraction,
      pool,
    )


def _prepare(
  files: tuple[AnnotationFile, ...],
  root: ImageRoot,
  out: pathlib.Path,
  parameters: dict[str, Any],
  max_rejected_fraction: float,
  workers: Workers | BeamWorkers,
) -> Corpus:
  inputs = _inputs_digest(files, root, parameters, workers)
  held = _held(out)
  if held and held.inputs == inputs:
    print(f"reusing the corpus in {out}: it was prepared from the same inputs")
    _check_rejected(held.stats, max_rejected_fraction, out / "rejections.jsonl")
    return held
  found = _with_images(scan_files(files, workers, whole_lines=True), root, workers)
  stats = {"records": found.scan.records, "rejected": counts_by_reason(found.scan.rejections)}
  for reason, count in stats["rejected"].items():
    print(f"rejected {count:>8,}  {reason}: {REASONS[reason]}")
  listing = out.with_name(out.name + ".rejections.jsonl")
  out.parent.mkdir(parents=True, exist_ok=True)
  write_jsonl(found.scan.rejections, listing)
  _check_rejected(stats, max_rejected_fraction, listing)
  if not found.names:
    raise CorpusError(f"none of {stats['records']:,} records can be used: see {listing}")
  with _published(out) as part:
    digest = _write(part, found, root, parameters, workers)
    listing.rename(part / "rejections.jsonl")
    summary = {"format": FORMAT, "digest": digest, "inputs": inputs, "stats": stats}
    (part / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
  corpus = Corpus.open(out)
  print(f"prepared {len(corpus):,} rollouts with {len(corpus.image_sizes):,} images in {out}")
  return corpus


def _held(out: pathlib.Path) -> Corpus | None:
  """Returns the corpus in `out`, None if it cannot be used; refuses a folder of something else."""
  if not out.exists():
    return None
  try:
    return Corpus.open(out)
  except CorpusError:
    if (out / "corpus.json").exists() or not any(out.iterdir()):
      return None
    raise CorpusError(f"{out} holds something else than a corpus: name another folder") from None


def _check_rejected(stats: dict[str, Any], limit: float, listing: pathlib.Path) -> None:
  rejected, records = sum(stats["rejected"].values()), stats["records"]
  if rejected > limit * records:
    raise TooManyRejectedError(
      f"{rejected:,} of {records:,} records are rejected, more than max_rejected_fraction "
      f"{limit:g}: {stats['rejected']}. Each is listed in {listing}: mend the records, or allow more"
    )


def _inputs_digest(
  files: tuple[AnnotationFile, ...],
  root: ImageRoot,
  parameters: dict[str, Any],
  workers: Workers | BeamWorkers,
) -> str:
  """Returns a digest of what is to be read: annotations by content, images by their stamps."""
  paths = sorted({file.path for file in files})
  digests = workers.map(_file_digest, paths)
  state = hashlib.blake2b(json.dumps(parameters).encode(), digest_size=16)
  state.update(repr(([file.name for file in files], digests)).encode())
  for name, size, stamp in sorted(root.listing()):
    state.update(f"{name}\0{size}\0{stamp}\n".encode("utf-8", "surrogateescape"))
  return state.hexdigest()


def _file_digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "blake2b").hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
  """A scan whose images have been looked at; rows with a bad image are no longer STRICT_OK.

  Attributes:
    scan: see `scan.Scan`.
    names: the images of the strict rows, each once, in order of first reference.
    sizes: int32[images, 2], upright (height, width).
    hashes: hex digests of their bytes.
    image_ids: for each image set, the numbers of its images, () if it cannot be used.
  """

  scan: Scan
  names: list[str]
  sizes: np.ndarray
  hashes: list[str]
  image_ids: list[tuple[int, ...]]


def _with_images(found: Scan, root: ImageRoot, workers: Workers | BeamWorkers) -> _Found:
  """Looks at every image of the strict rows once and rejects the rows whose images are bad."""
  c = found.columns
  used = np.unique(c.image_set[(c.flags & STRICT_OK) != 0]).tolist()
  references = list(dict.fromkeys(name for at in used for name in found.image_sets[at]))
  size = max(1, min(1000, len(references) // (8 * workers.count)))
  chunks = [references[at : at + size] for at in range(0, len(references), size)]
  with ProgressBar("images checked", len(references)) as bar:
    look = functools.partial(_look_at, root)
    seen = workers.map(look, chunks, lambda part: bar.update(len(part)))
  seen = dict(zip(references, itertools.chain.from_iterable(seen), strict=True))

  numbers: dict[_Image, int] = {}
  image_ids: list[tuple[int, ...]] = [()] * len(found.image_sets)
  bad: dict[int, BadRecord] = {}
  for at in used:
    images = [seen[reference] for reference in found.image_sets[at]]
    errors = [image for image in images if isinstance(image, BadRecord)]
    if errors:
      bad[at] = errors[0]
    else:
      image_ids[at] = tuple(numbers.setdefault(image, len(numbers)) for image in images)
  return _Found(
    scan=_reject_images(found, bad),
    names=[image.name for image in numbers],
    sizes=np.array([(image.height, image.width) for image in numbers], np.int32).reshape(-1, 2),
    hashes=[image.digest for image in numbers],
    image_ids=image_ids,
  )


class _Image(NamedTuple):
  name: str
  height: int
  width: int
  digest: str


def _look_at(root: ImageRoot, references: list[str]) -> list[_Image | BadRecord]:
  """Returns what each reference leads to, or why it is bad."""
  seen = []
  for reference in references:
    try:
      name = root.locate(reference)
      data = root.read(name)
      digest = hashlib.blake2b(data, digest_size=16).hexdigest()
      seen.append(_Image(name, *image_size(data, name), digest))
    except BadRecord as error:
      seen.append(error)
  return seen


def _reject_images(found: Scan, bad: dict[int, BadRecord]) -> Scan:
  """Returns the scan with the strict rows of bad image sets rejected."""
  rows = np.flatnonzero(
    (found.columns.flags & STRICT_OK != 0) & np.isin(found.columns.image_set, list(bad))
  )
  reasons = [bad[at] for at in found.columns.image_set[rows].tolist()]
  return found.reject(rows, [(error.reason, error.detail) for error in reasons])


def _write(
  out: pathlib.Path,
  found: _Found,
  root: ImageRoot,
  parameters: dict[str, Any],
  workers: Workers | BeamWorkers,
) -> str:
  """Writes everything but corpus.json and returns the corpus digest."""
  c = found.scan.columns
  rows = np.flatnonzero(c.flags & STRICT_OK)
  numbers = np.full(c.line.size, -1)
  numbers[rows] = np.arange(rows.size)
  digest = _corpus_digest(found, parameters)
  parameters = {name: parameters[name] for name in ("tau", "unmeasured")}
  found.scan.table(rollout=numbers, digest=digest, **parameters).save(out / "score_table.npz")
  image_ids = [found.image_ids[at] for at in c.image_set[rows].tolist()]
  starts = np.cumsum([0, *map(len, image_ids)])
  np.savez(
    out / "index.npz",
    image_sizes=found.sizes,
    image_ids=np.array(list(itertools.chain.from_iterable(image_ids)), np.int64),
    image_starts=starts.astype(np.int64),
  )
  shards = _rollout_shards(found, rows, image_ids)
  noted = workers.map(_notes, shards)
  write_jsonl(itertools.chain.from_iterable(noted), out / "notes.jsonl")
  tfds_builders.write(tfds_builders.Rollouts(shards, data_dir=out, workers=workers))
  tfds_builders.write(
    tfds_builders.Images(_image_shards(found, root), data_dir=out, workers=workers)
  )
  shutil.rmtree(out / "downloads", ignore_errors=True)  # made by TFDS, empty
  return digest


def _corpus_digest(found: _Found, parameters: dict[str, Any]) -> str:
  """Returns 16 hex digits that change with any record, image or parameter."""
  state = hashlib.blake2b(json.dumps(parameters).encode(), digest_size=8)
  state.update(repr([file.source for file in found.scan.files]).encode())
  c = found.scan.columns
  for column in (found.scan.source, c.line, c.fingerprint, c.flags):
    state.update(np.ascontiguousarray(column).tobytes())
  for name, digest in zip(found.names, found.hashes, strict=True):
    state.update(f"{name}\0{digest}\n".encode())
  return state.hexdigest()


def _rollout_shards(
  found: _Found, rows: np.ndarray, image_ids: list[tuple[int, ...]]
) -> list[tfds_builders.RolloutShard]:
  """Returns the rows in shards of about `_SHARD_BYTES` of annotations, each of one source."""
  c, shards = found.scan.columns, []
  for part in _runs(c.length[rows], found.scan.source[rows]):
    chosen, ids = rows[part], image_ids[part]
    shards.append(
      tfds_builders.RolloutShard(
        file=found.scan.files[found.scan.source[chosen[0]]],
        first=part.start,
        line=c.line[chosen],
        offset=c.offset[chosen],
        length=c.length[chosen],
        image_ids=ids,
        images=[tuple(found.names[image] for image in images) for images in ids],
      )
    )
  return shards


def _image_shards(found: _Found, root: ImageRoot) -> list[tfds_builders.ImageShard]:
  sizes = np.array([root.stamp(name)[0] for name in found.names])
  return [
    tfds_builders.ImageShard(root, part.start, found.names[part], found.sizes[part])
    for part in _runs(sizes, np.zeros(sizes.size))
  ]


def _runs(sizes: np.ndarray, groups: np.ndarray) -> list[slice]:
  """Returns slices of neighbours of one group, each of about `_SHARD_BYTES`."""
  slot = np.cumsum(np.maximum(sizes, _EXAMPLE_BYTES), dtype=np.int64) // _SHARD_BYTES
  new = np.flatnonzero((np.diff(slot) != 0) | (np.diff(groups) != 0)) + 1
  bounds = [0, *new.tolist(), sizes.size]
  return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def _notes(shard: tfds_builders.RolloutShard) -> list[Rejected]:
  return [
    Rejected(rollout.source, rollout.line, *note)
    for rollout in shard.rollouts()
    for note in records.notes(rollout)
  ]


@contextlib.contextmanager
def _published(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder to fill, which takes the place of `out` once it is complete."""
  part = _mine(out, "part")
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir(parents=True)
  try:
    yield part
    if out.exists():
      old = _mine(out, "old")
      out.rename(old)
      part.rename(out)
      shutil.rmtree(old)
    else:
      part.rename(out)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _mine(out: pathlib.Path, kind: str) -> pathlib.Path:
  """Returns a name beside `out` that is this process's: OUT.part-HOST-PID."""
  return out.with_name(f"{out.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def _clear_up(out: pathlib.Path) -> None:
  """Deletes what killed processes of this host left beside `out`; those of others may be alive."""
  name = f"{re.escape(out.name)}\\.(?:part|old|beam)-{re.escape(socket.gethostname())}-([0-9]+)"
  for path in out.parent.glob("*") if out.parent.is_dir() else ():
    if (left := re.fullmatch(name, path.name)) and not _is_alive(int(left[1])):
      print(f"deleting {path}, left by a run that was killed")
      shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass  # somebody else's
  return True
