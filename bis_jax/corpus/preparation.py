"""Raw annotations and images -> a prepared corpus, complete or not written at all.

Each annotation file is read twice: once to check every line and once to write the rollouts.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from bis_jax import files
from bis_jax.console import log, progress_bar
from bis_jax.corpus import shards, shared
from bis_jax.corpus.containers import ConvertedFile, sources
from bis_jax.corpus.corpus import CONTENTS, FORMAT, Corpus
from bis_jax.corpus.formats import AUTO
from bis_jax.corpus.image_root import EMBEDDED, ImageRoot, ImageRoots, image_size
from bis_jax.corpus.reading import AnnotationFile
from bis_jax.corpus.rejections import REASONS, BadRecord, CorpusError, write_jsonl
from bis_jax.corpus.scan import Scan, scan_files
from bis_jax.corpus.workers import BeamWorkers, Workers

_SHARD_BYTES = 64 << 20  # of a shard's inputs; an example counts as at least _EXAMPLE_BYTES
_EXAMPLE_BYTES = 8 << 10
# Earlier versions prepared a corpus for one tau and policy; their digests of these are still valid.
_PARAMETERS = {"format": FORMAT, "tau": 0.0, "unmeasured": "negative"}


class TooManyRejectedError(CorpusError):
  """More records were rejected than the run allows."""


def prepare(
  annotations: str | os.PathLike,
  images: str | os.PathLike | None,
  out: str | os.PathLike,
  *,
  format: str = AUTO,
  agreement: str = "",
  max_rejected_fraction: float = 0.01,
  workers: int = 0,
  beam: Sequence[str] | None = None,
) -> Corpus:
  """Prepares a corpus in `out` and returns it; reuses one made from the same inputs.

  Raises TooManyRejectedError, or CorpusError if the inputs are missing or damaged, no record can be
  used, or `out` holds files that are not a corpus.

  Args:
    annotations: a folder, zip or file, or a dataset id of the hub; see `containers.sources`.
    images: the image root, a folder or a zip; nothing outside it is read. None: rollouts of text
      alone, or images in columns.
    out: folder of the corpus. A corpus of other inputs there is replaced.
    format: of the records, a name of `formats.FORMATS`; "auto" recognizes each file's.
    agreement: key of a second MC score, see `formats.agreeing`.
    max_rejected_fraction: of all records; if more are rejected, only `OUT.rejections.jsonl` is
      written.
    workers: processes; 0 for one per core.
    beam: options of Apache Beam, which then does the work instead; [] runs it on this machine.
  """
  out = files.absolute(out)
  found_files = tuple(sources(annotations, format, agreement))
  root = ImageRoot(images) if images else None
  # Files count as unchanged if their sizes and modification times are the same.
  stamps = [file.stamp for file in found_files], sorted(root.listing() if root else ())
  inputs = files.digest(_PARAMETERS, *stamps)
  listing = out.with_name(out.name + ".rejections.jsonl")
  held = _held(out)
  if held and held.inputs == inputs:
    return _reuse(held, max_rejected_fraction)
  with contextlib.ExitStack() as until_made:
    until_made.enter_context(shared.owner(out))
    held = _held(out, told=True)
    if held and held.inputs == inputs:  # made by the process that this one waited for
      return _reuse(held, max_rejected_fraction)
    pool = until_made.enter_context(Workers(workers) if beam is None else BeamWorkers(beam, out))
    roots = until_made.enter_context(_image_roots(out, found_files, root, pool))
    found = _with_images(scan_files(found_files, pool, whole_lines=True), roots, pool)
    stats = {"records": found.scan.records, "rejected": found.scan.counts_by_reason()}
    digest = _corpus_digest(found)
    summary = {"format": FORMAT, "digest": digest, "inputs": inputs, "stats": stats}
    if held and (held.digest, held.stats) == (digest, stats):
      shared.write_record(out / "corpus.json", summary | {"files": held.files})
      return _reuse(held, max_rejected_fraction)
    for reason, count in stats["rejected"].items():
      log.info("rejected %8s  %s: %s", f"{count:,}", reason, REASONS[reason])
    if found.scan.unlisted:
      log.info("rejections.jsonl lists %s of them", f"{len(found.scan.rejections):,}")
    try:
      _check_rejected(stats, max_rejected_fraction, listing)
    except CorpusError:
      write_jsonl(found.scan.rejections, listing)
      raise
    files.require_room(out, sum(roots.stamp(image.name)[0] for image in found.images))
    with files.new_folder(out, replace=True) as part:
      digests = _write(part, found, roots, digest, pool)
      shared.write_record(part / "corpus.json", summary | {"files": digests})
  listing.unlink(missing_ok=True)  # of an earlier attempt
  corpus = Corpus(out)
  log.info(
    "prepared %s rollouts with %s images in %s",
    f"{len(corpus):,}",
    f"{len(corpus.image_sizes):,}",
    out,
  )
  return corpus


@contextlib.contextmanager
def _image_roots(
  out: epath.Path, found: Sequence[AnnotationFile], root: ImageRoot | None, workers: Workers
) -> Iterator[ImageRoots]:
  """Yields the image root with the images in columns, extracted beside `out` until it is done."""
  of_columns = [f for f in found if isinstance(f, ConvertedFile) and f.embeds_images()]
  if not of_columns:
    yield ImageRoots(root)
    return
  with files.temporary_folder(out.with_name(f"{out.name}.images")) as folder:
    tasks = [(file, group, folder) for file in of_columns for group in range(file.groups())]
    with progress_bar("images of columns", len(tasks)) as bar:
      workers.map(_extract, tasks, lambda _: bar.update())
    yield ImageRoots(root, folder)


def _extract(task: tuple[ConvertedFile, int, epath.Path]) -> None:
  file, group, folder = task
  for reference, content in file.embedded_images(group):
    path = folder / reference.removeprefix(EMBEDDED)
    if not path.exists():
      with files.replacing(path) as image:
        image.write(content)


def _held(out: epath.Path, *, told: bool = False) -> Corpus | None:
  """Returns the corpus in `out`, None if unusable; raises for a folder of something else."""
  if not out.exists():
    return None
  try:
    return Corpus.open(out)
  except CorpusError as error:
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    if "corpus.json" in names or names <= CONTENTS:
      if names and told:
        log.warning("preparing the corpus in %s again, as %s", out, error)
      return None
    raise CorpusError(f"{out} is not a prepared corpus: name another folder") from None


def _reuse(held: Corpus, max_rejected_fraction: float) -> Corpus:
  log.info("reusing the corpus in %s: it was prepared from the same inputs", held.path)
  _check_rejected(held.stats, max_rejected_fraction, held.path / "rejections.jsonl")
  return held


def _check_rejected(stats: dict[str, Any], limit: float, listing: epath.Path) -> None:
  rejected, records = sum(stats["rejected"].values()), stats["records"]
  if rejected > limit * records:
    raise TooManyRejectedError(
      f"{rejected:,} of {records:,} records are rejected, more than max_rejected_fraction "
      f"{limit:g}: {stats['rejected']}. All are listed in {listing}: correct them, or allow more"
    )
  if rejected == records:
    raise CorpusError(f"none of {records:,} records can be used: see {listing}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
  """A scan whose images were checked; rows with a bad image are no longer STRICT_OK."""

  scan: Scan
  images: list["_Image"]  # of the strict rows, each once, in order of first reference
  image_ids: list[tuple[int, ...]]  # for each image set; () if it cannot be used


class _Image(NamedTuple):
  """An image that decodes: upright size in pixels, hex digest of its bytes."""

  name: str
  height: int
  width: int
  digest: str


def _with_images(found: Scan, root: ImageRoots, workers: Workers) -> _Found:
  """Checks every image of the strict rows once and rejects the rows whose images are bad."""
  used = found.used_image_sets()
  references = list(dict.fromkeys(name for at in used for name in found.image_sets[at]))
  size = max(1, min(1000, len(references) // (8 * workers.count)))
  chunks = [references[at : at + size] for at in range(0, len(references), size)]
  with progress_bar("images checked", len(references)) as bar:
    check = functools.partial(_check_images, root)
    checked = workers.map(check, chunks, lambda part: bar.update(len(part)))
  images = dict(zip(references, itertools.chain.from_iterable(checked), strict=True))

  numbers: dict[_Image, int] = {}
  image_ids: list[tuple[int, ...]] = [()] * len(found.image_sets)
  bad: dict[int, BadRecord] = {}
  for at in used:
    of_set = []
    for reference in found.image_sets[at]:
      image = images[reference]
      if isinstance(image, BadRecord):
        bad[at] = image
        break
      of_set.append(image)
    else:
      image_ids[at] = tuple(numbers.setdefault(image, len(numbers)) for image in of_set)
  return _Found(found.reject_image_sets(bad), list(numbers), image_ids)


def _check_images(root: ImageRoots, references: list[str]) -> list[_Image | BadRecord]:
  located = [_located(root, reference) for reference in references]
  contents = root.read_each([name for name in located if isinstance(name, str)])
  return [
    name if isinstance(name, BadRecord) else _checked(name, next(contents)) for name in located
  ]


def _located(root: ImageRoots, reference: str) -> str | BadRecord:
  try:
    return root.locate(reference)
  except BadRecord as error:
    return error


def _checked(name: str, data: bytes | BadRecord) -> _Image | BadRecord:
  if isinstance(data, BadRecord):
    return data
  try:
    return _Image(name, *image_size(data, name), hashlib.blake2b(data, digest_size=16).hexdigest())
  except BadRecord as error:
    return error


def _corpus_digest(found: _Found) -> str:
  """Returns 16 hex digits that change with any record or image."""
  state = hashlib.blake2b(json.dumps(_PARAMETERS).encode(), digest_size=8)
  state.update(repr([file.source for file in found.scan.files]).encode())
  c = found.scan.columns
  for column in (found.scan.source, c.line, c.fingerprint, c.flags):
    state.update(np.ascontiguousarray(column).tobytes())
  for image in found.images:
    state.update(f"{image.name}\0{image.digest}\n".encode())
  return state.hexdigest()


def _write(
  out: epath.Path,
  found: _Found,
  root: ImageRoots,
  digest: str,
  workers: Workers,
) -> shared.Digests:
  """Writes all files but corpus.json; returns their digests."""
  c = found.scan.columns
  rows = np.flatnonzero(found.scan.strict)
  numbers = np.full(c.line.size, -1)
  numbers[rows] = np.arange(rows.size)
  sizes = np.array([(image.height, image.width) for image in found.images], np.int32).reshape(-1, 2)
  image_ids = [found.image_ids[at] for at in c.image_set[rows].tolist()]
  names = [image.name for image in found.images]
  rollout_shards = [
    shards.RolloutShard(
      file=found.scan.files[found.scan.source[rows[part.start]]],
      line=c.line[rows[part]],
      offset=c.offset[rows[part]],
      length=c.length[rows[part]],
      image_ids=image_ids[part],
      images=[tuple(names[image] for image in images) for images in image_ids[part]],
    )
    for part in _runs(c.length[rows], found.scan.source[rows])
  ]
  rollouts = shards.write(out, "rollouts", rollout_shards, workers)
  stored = np.array([root.stamp(name)[0] for name in names])  # bytes
  image_shards = [
    shards.ImageShard(root, names[part], sizes[part])
    for part in _runs(stored, np.zeros(stored.size))
  ]
  images = shards.write(out, "images", image_shards, workers)
  with files.written_locally(out) as folder:
    write_jsonl(found.scan.rejections, folder / "rejections.jsonl")
    write_jsonl(rollouts.notes, folder / "notes.jsonl")
    found.scan.table(rollout=numbers, digest=digest).save(folder / "score_table.npz")
    index: dict[str, Any] = {
      "image_sizes": sizes,
      "image_ids": np.array(list(itertools.chain.from_iterable(image_ids)), np.int64),
      "image_starts": np.cumsum([0, *map(len, image_ids)]).astype(np.int64),
    }
    index |= rollouts.ranges.arrays("rollouts") | images.ranges.arrays("images")
    np.savez(folder / "index.npz", **index)
    return shared.digests_of(folder, rollouts.digests | images.digests)


def _runs(sizes: np.ndarray, groups: np.ndarray) -> list[slice]:
  """Returns slices of consecutive members of one group, each of about `_SHARD_BYTES`."""
  slot = np.cumsum(np.maximum(sizes, _EXAMPLE_BYTES), dtype=np.int64) // _SHARD_BYTES
  new = np.flatnonzero((np.diff(slot) != 0) | (np.diff(groups) != 0)) + 1
  bounds = [0, *new.tolist(), sizes.size]
  return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
