"""The TFDS datasets of a prepared corpus: `rollouts` and `images`, as ArrayRecord shards.

Every shard is a generator of examples that can run anywhere: in this process, in worker processes,
or on Apache Beam. What a shard holds does not depend on where it runs. TensorFlow is not needed.
(TFDS can run shards on Beam itself, but puts all that they hold into the pipeline's graph.)

Source: `tfds.core.ShardBasedBuilder`.
"""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from bis_jax.corpus import records
from bis_jax.corpus.beam_workers import BeamWorkers
from bis_jax.corpus.corpus import SPLIT
from bis_jax.corpus.image_root import ImageRoot
from bis_jax.corpus.reading import AnnotationFile
from bis_jax.corpus.workers import ProgressBar, Workers

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
  """Returns the features of one image: its original bytes, its name, its upright size in pixels."""
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(),
      "name": tfds.features.Text(),
      "height": np.int32,
      "width": np.int32,
    }
  )


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutShard:
  """Some rollouts of one source that follow each other.

  Attributes:
    file: the source.
    first: number of the first rollout in the corpus.
    line, offset, length: int[k], where the raw lines lie.
    image_ids: a tuple of image numbers a rollout.
    images: a tuple of image names a rollout.
  """

  file: AnnotationFile
  first: int
  line: np.ndarray
  offset: np.ndarray
  length: np.ndarray
  image_ids: Sequence[tuple[int, ...]]
  images: Sequence[tuple[str, ...]]

  def __len__(self) -> int:
    return self.line.size

  def rollouts(self) -> Iterator[records.Rollout]:
    """Yields the rollouts, read again from the annotations."""
    raw_lines = self.file.read_lines(self.offset.tolist(), self.length.tolist())
    for at, raw in enumerate(raw_lines):
      rollout = records.parse_rollout(
        records.load_object(raw), self.file.source, int(self.line[at])
      )
      yield dataclasses.replace(rollout, images=self.images[at])

  def __call__(self) -> Iterator[tuple[int, Example]]:
    for at, rollout in enumerate(self.rollouts()):
      example = {name: getattr(rollout, name) for name in records.Rollout.__slots__}
      example["scores"] = np.array(rollout.scores, np.float64)
      yield self.first + at, example | {"image_ids": self.image_ids[at]}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageShard:
  """Some images that follow each other: names and int32[k, 2] upright (height, width)."""

  root: ImageRoot
  first: int
  names: Sequence[str]
  sizes: np.ndarray

  def __len__(self) -> int:
    return len(self.names)

  def __call__(self) -> Iterator[tuple[int, Example]]:
    for at, (name, (height, width)) in enumerate(zip(self.names, self.sizes, strict=True)):
      data = self.root.read(name)
      yield self.first + at, {"image": data, "name": name, "height": height, "width": width}


Shard = RolloutShard | ImageShard


class _ShardBuilder(tfds.core.ShardBasedBuilder):
  """Writes given shards in their order, each by one worker."""

  VERSION = tfds.core.Version("1.0.0")
  FEATURES: Callable[[], tfds.features.FeaturesDict]

  def __init__(
    self, shards: Sequence[Shard], *, data_dir: pathlib.Path, workers: Workers | BeamWorkers
  ):
    """Holds shards that are to be written under `data_dir`."""
    self._shards, self._workers = shards, workers
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    features = type(self).FEATURES()
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, Sequence[Shard]]:
    return {SPLIT: self._shards}

  def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
    template = self._get_filename_template(split_name=SPLIT)
    paths = [
      template.sharded_filepath(shard_index=at, num_shards=len(self._shards))
      for at in range(len(self._shards))
    ]
    write = functools.partial(_write_shard, type(self).FEATURES)
    tasks = list(zip(self._shards, map(os.fspath, paths), strict=True))
    with ProgressBar(self.name, sum(map(len, self._shards))) as bar:
      self._workers.map(write, tasks, bar.update)
    split = tfds.core.SplitInfo(
      name=SPLIT,
      shard_lengths=list(map(len, self._shards)),
      num_bytes=sum(path.stat().length for path in paths),
      filename_template=template,
    )
    self.info.set_splits(tfds.core.splits.SplitDict([split]))


class Rollouts(_ShardBuilder):
  """The rollouts that strict order accepts, in (file name, line) order."""

  FEATURES = staticmethod(rollout_features)


class Images(_ShardBuilder):
  """The images that those rollouts refer to, each once, in order of first reference."""

  FEATURES = staticmethod(image_features)


def write(builder: _ShardBuilder) -> None:
  """Writes the dataset of a builder; TFDS publishes it whole or not at all."""
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it would download
    builder.download_and_prepare()


def _write_shard(
  features: Callable[[], tfds.features.FeaturesDict], task: tuple[Shard, str]
) -> int:
  """Writes one ArrayRecord file and returns how many examples it holds."""
  shard, path = task
  serialize = features().serialize_example
  part = f"{path}.part-{socket.gethostname()}-{os.getpid()}"
  writer = ArrayRecordWriter(part, "group_size:1")
  for _, example in shard():
    writer.write(serialize(example))
  writer.close()
  os.replace(part, path)  # Beam may run a task twice
  return len(shard)
