"""A prepared corpus in a folder or in an object store, read by number.

out/corpus.json         digest, inputs and counts; written last
out/rollouts/, images/  TFDS datasets (ArrayRecord); see `shards`
out/index.npz           image sizes, the image numbers of every rollout, and the byte ranges of
                        all records, by which they are read
out/score_table.npz     see `score_table`
out/rejections.jsonl    one line per rejected record; notes.jsonl: per noted record
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from bis_jax import storage
from bis_jax.corpus import byte_ranges, shared
from bis_jax.corpus.byte_ranges import Ranges
from bis_jax.corpus.records import Rollout
from bis_jax.corpus.rejections import CorpusError
from bis_jax.corpus.score_table import ScoreTable

FORMAT = 1  # of the files above
SPLIT = "train"  # of both datasets: they have one split
CONTENTS = {"corpus.json", "rollouts", "images", "index.npz", "score_table.npz"}
_SUSPECT = "suspect"  # there if a record could not be read
CONTENTS |= {"rejections.jsonl", "notes.jsonl", _SUSPECT}
_CHECKED_BYTES = 1 << 30  # shards of a larger corpus are checked by size: their records have hashes


@dataclasses.dataclass(frozen=True, slots=True)
class StoredRollout(Rollout):
  image_ids: tuple[int, ...]


class Corpus:
  """Rollouts and images by number. Pickles as its path, so worker processes open their own.

  In an object store only the records that are asked for are read, and nothing is kept on disk.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens the corpus in a folder; CorpusError if there is none, or one of another version."""
    self.path, path = epath.Path(path), epath.Path(path) / "corpus.json"
    try:
      held = json.loads(path.read_bytes())
      if shared.CHECK in held or "files" in held:  # earlier versions wrote neither
        held = shared.read_record(path) or {}
      if held.get("format") not in (FORMAT, None):
        raise CorpusError(f"{self.path} was prepared by another version: prepare it again")
      self.digest: str = held["digest"]
      self.inputs: str = held["inputs"]
      self.stats: dict[str, Any] = held["stats"]
      self.files: shared.Digests = held.get("files", {})
    except FileNotFoundError as error:
      raise CorpusError(
        f"{self.path} holds no prepared corpus ({error}): run python -m bis_jax.prepare"
      ) from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
      raise self._damaged(path) from error
    self._readers: dict[str, Callable[[list[int]], list[bytes]]] = {}
    self._process = os.getpid()

  @classmethod
  def open(cls, path: str | os.PathLike) -> "Corpus":
    """Opens a corpus and checks its files; raises CorpusError if one is damaged."""
    corpus = cls(path)
    if damaged := corpus.damaged_file():
      raise corpus._damaged(damaged)
    return corpus

  def damaged_file(self) -> epath.Path | None:
    """Returns a file that is not as it was written, None if there is none.

    Shards of more than a gigabyte in all, or in an object store, are checked by their sizes, unless
    a record of this corpus could not be read before: that reads them whole.
    """
    suspect = self.path / _SUSPECT
    total = sum(int(digest.split()[0]) for digest in self.files.values())
    by_size = (total > _CHECKED_BYTES or storage.is_url(self.path)) and not suspect.exists()
    damaged = shared.damaged_file(
      self.path, self.files, lambda name: by_size and ".array_record" in name
    )
    if damaged is None:
      suspect.unlink(missing_ok=True)
    return damaged

  def _damaged(self, path: epath.Path) -> CorpusError:
    return CorpusError(
      f"{path} is damaged: run the same python -m bis_jax.main or bis_jax.prepare again, which makes "
      "the corpus again"
    )

  def __reduce__(self):
    return Corpus, (self.path,)

  def __len__(self) -> int:
    return self._index["image_starts"].size - 1

  @functools.cached_property
  def score_table(self) -> ScoreTable:
    """One row per scorable record; `rollout` is the number of the stored rollout, or -1."""
    return ScoreTable.load(self.path / "score_table.npz")

  @functools.cached_property
  def _index(self) -> dict[str, np.ndarray]:
    with (self.path / "index.npz").open("rb") as file, np.load(file, allow_pickle=False) as held:
      return dict(held)

  @property
  def image_sizes(self) -> np.ndarray:
    """int32[images, 2], upright (height, width) in pixels."""
    return self._index["image_sizes"]

  def image_ids(self, i: int) -> tuple[int, ...]:
    start, stop = self._index["image_starts"][i : i + 2]
    return tuple(self._index["image_ids"][start:stop].tolist())

  def rollout(self, i: int) -> StoredRollout:
    return self.rollouts([i])[0]

  def rollouts(self, indices: Sequence[int]) -> list[StoredRollout]:
    records = self._features("rollouts", indices)
    return [self._rollout(i, feature) for i, feature in zip(indices, records, strict=True)]

  def _rollout(self, i: int, feature: Any) -> StoredRollout:
    return StoredRollout(
      source=feature["source"].bytes_list.value[0].decode(),
      line=feature["line"].int64_list.value[0],
      images=_texts(feature["images"]),
      question=feature["question"].bytes_list.value[0].decode(),
      steps=_texts(feature["steps"]),
      scores=tuple(np.frombuffer(feature["scores"].bytes_list.value[0], np.float64).tolist()),
      measured=tuple(map(bool, feature["measured"].int64_list.value)),
      answer=feature["answer"].bytes_list.value[0].decode(),
      image_ids=self.image_ids(i),
    )

  def continuations(self, rollout: Rollout) -> np.ndarray:
    """Returns int64[steps], how many each step of a stored rollout has; -1 if it is not known."""
    table = self.score_table
    rows = table.rows_of(table.source_names.index(rollout.source))
    row = rows.start + int(np.searchsorted(table.line[rows], rollout.line))
    start = self._first_steps[row]
    total = table.total[start : start + table.steps[row]].astype(np.int64)
    return np.where(total == np.iinfo(table.total.dtype).max, -1, total)

  @functools.cached_property
  def _first_steps(self) -> np.ndarray:
    return self.score_table.starts()

  def image(self, image_id: int) -> bytes:
    """Returns the encoded bytes of an image, as they were in its file."""
    return self.images([image_id])[0]

  def images(self, image_ids: Sequence[int]) -> list[bytes]:
    records = self._features("images", image_ids)
    return [feature["image"].bytes_list.value[0] for feature in records]

  def _features(self, dataset: str, indices: Sequence[int]) -> list[Any]:
    # TFDS's own decoding takes 5 times longer.
    if self._process != os.getpid():  # open readers do not survive a fork
      self._readers, self._process = {}, os.getpid()
    try:
      if dataset not in self._readers:
        self._readers[dataset] = self._reader(dataset)
      raw = self._readers[dataset](list(indices))
      # pyrefly: ignore[missing-attribute]  # in generated code
      return [tf_example_pb2.Example.FromString(record).features.feature for record in raw]
    except (ConnectionError, PermissionError):
      raise
    except Exception as error:  # libraries raise many types for damaged files
      with contextlib.suppress(OSError):
        (self.path / _SUSPECT).touch()
      which = f"records {list(indices)[:3]}: {error}"
      raise CorpusError(f"{self._damaged(self.path / dataset)} ({which})") from error

  def _reader(self, dataset: str) -> Callable[[list[int]], list[bytes]]:
    """Returns a function that reads records by number, together."""
    shards = [os.fspath(self.path / name) for name in sorted(self.files)]
    shards = [name for name in shards if f"/{dataset}/" in name and ".array_record" in name]
    if shards and f"{dataset}_start" in self._index:
      ranges = Ranges.of(self._index, dataset)
      return functools.partial(byte_ranges.read, storage.filesystem(self.path), shards, ranges)
    if storage.is_url(self.path):
      raise CorpusError(
        f"{self.path} was prepared by an earlier version and can only be read from a local disk: "
        "copy it there, or name another corpus.cache"
      )
    (folder,) = (self.path / dataset).iterdir()
    source: Any = tfds.builder_from_directory(folder).as_data_source(
      split=SPLIT, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    return source.__getitems__


def _texts(feature: Any) -> tuple[str, ...]:
  return tuple(text.decode() for text in feature.bytes_list.value)
