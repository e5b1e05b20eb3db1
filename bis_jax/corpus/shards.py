"""The datasets of a prepared corpus, `rollouts` and `images`: ArrayRecord shards that TFDS reads.

Every shard makes its examples itself, in this process, a worker process or on Apache Beam, with the
same content. TensorFlow is not needed.
"""

import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from bis_jax import files
from bis_jax.console import progress_bar
from bis_jax.corpus import byte_ranges, records, shared
from bis_jax.corpus.byte_ranges import Ranges
from bis_jax.corpus.corpus import SPLIT
from bis_jax.corpus.image_root import ImageRoots
from bis_jax.corpus.reading import AnnotationFile
from bis_jax.corpus.rejections import BadRecord, CorpusError, Rejected
from bis_jax.corpus.workers import Workers

Example = dict[str, Any]


def rollout_features() -> tfds.features.FeaturesDict:
  """Returns the features of one rollout; `image_ids` are positions in the `images` dataset."""
  return tfds.features.FeaturesDict(
    {
      "source": tfds.features.Text(),
      "line": np.int32,
      "image_ids": tfds.features.Sequence(np.int64),
      "images": tfds.features.Sequence(tfds.features.Text()),
      "question": tfds.features.Text(),
      "steps": tfds.features.Sequence(tfds.features.Text()),
      # Bytes, because tf.Example knows no float64 and scores are exact.
      "scores": tfds.features.Tensor(
        shape=(None,), dtype=np.float64, encoding=tfds.features.Encoding.BYTES
      ),
      "measured": tfds.features.Sequence(np.bool_),
      "answer": tfds.features.Text(),
    }
  )


def image_features() -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(),
      "name": tfds.features.Text(),
      "height": np.int32,
      "width": np.int32,
    }
  )


FEATURES = {"rollouts": rollout_features, "images": image_features}


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutShard:
  """Consecutive rollouts of one source."""

  file: AnnotationFile
  line: np.ndarray  # int[k], line numbers
  offset: np.ndarray  # int[k], like `length`, bytes of the lines in the file
  length: np.ndarray
  image_ids: Sequence[tuple[int, ...]]  # numbers of the images of each rollout
  images: Sequence[tuple[str, ...]]  # their names

  def __len__(self) -> int:
    return self.line.size

  def __call__(self) -> Iterator[tuple[Example, list[Rejected]]]:
    raw_lines = self.file.read_lines(self.offset.tolist(), self.length.tolist())
    for at, raw in enumerate(raw_lines):
      record = records.load_object(raw)
      rollout = records.parse_rollout(record, self.file.source, int(self.line[at]))
      example = {name: getattr(rollout, name) for name in records.Rollout.__slots__}
      example["scores"] = np.array(rollout.scores, np.float64)
      example |= {"image_ids": self.image_ids[at], "images": self.images[at]}
      notes = records.notes(rollout)
      yield example, [Rejected(rollout.source, rollout.line, *note) for note in notes]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageShard:
  """Consecutive images: names and int32[k, 2] upright (height, width)."""

  root: ImageRoots
  names: Sequence[str]
  sizes: np.ndarray

  def __len__(self) -> int:
    return len(self.names)

  def __call__(self) -> Iterator[tuple[Example, list[Rejected]]]:
    contents = self.root.read_each(self.names)
    for name, (height, width), data in zip(self.names, self.sizes, contents, strict=True):
      if isinstance(data, BadRecord):
        raise data
      yield {"image": data, "name": name, "height": height, "width": width}, []


Shard = RolloutShard | ImageShard


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
  """What a shard or a whole dataset became."""

  ranges: Ranges
  digests: shared.Digests  # of the shards
  notes: list[Rejected]  # on the examples


def write(out: epath.Path, name: str, shards: Sequence[Shard], workers: Workers) -> Written:
  """Writes the TFDS dataset `name`, a key of FEATURES, under `out`, one file per shard."""
  folder = out / name / "1.0.0"
  folder.mkdir(parents=True)
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=name, split=SPLIT, filetype_suffix="array_record"
  )
  paths = [
    template.sharded_filepath(shard_index=at, num_shards=len(shards)) for at in range(len(shards))
  ]
  tasks = list(zip(shards, map(os.fspath, paths), strict=True))
  with progress_bar(name, len(tasks), unit="shard") as bar:
    done = workers.map(functools.partial(_write_shard, name), tasks, lambda _: bar.update())
  digests = [digest for part in done for digest in part.digests.values()]
  split = tfds.core.SplitInfo(
    name=SPLIT,
    shard_lengths=list(map(len, shards)),
    num_bytes=sum(int(digest.split()[0]) for digest in digests),
    filename_template=template,
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=FEATURES[name](),
    split_infos=[split],
    check_data=False,
    disable_shuffling=True,
  )
  names = [path.relative_to(out).as_posix() for path in paths]
  return Written(
    Ranges.concatenate([part.ranges for part in done]),
    dict(zip(names, digests, strict=True)),
    list(itertools.chain.from_iterable(part.notes for part in done)),
  )


def _write_shard(name: str, task: tuple[Shard, str]) -> Written:
  shard, path = task[0], epath.Path(task[1])
  serialize = FEATURES[name]().serialize_example
  checks, notes = [], []
  with files.written_locally(path.parent) as folder:
    written = epath.Path(folder / path.name)
    part = os.fspath(files.temporary_name(written))
    writer = ArrayRecordWriter(part, byte_ranges.WRITER_OPTIONS)
    try:
      for example, noted in shard():
        record = serialize(example)
        writer.write(record)
        checks.append(zlib.crc32(record))
        notes += noted
    except BadRecord as error:
      raise CorpusError(f"an input changed while it was read, start again: {error}") from error
    writer.close()
    ranges = byte_ranges.find(part, checks)
    os.replace(part, written)  # Beam may run a task twice
    digest = shared.digest_of(written)
  return Written(ranges, {path.name: digest}, notes)
