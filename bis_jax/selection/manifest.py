"""The record of a selection: its parameters, the kept rollouts, and the corpus."""

import dataclasses
import hashlib
import json
from typing import Any

import msgspec
import numpy as np
from etils import epath

from bis_jax import files
from bis_jax.errors import UserError


class ManifestError(UserError):
  """A damaged manifest, or one of another corpus."""


@dataclasses.dataclass(frozen=True, eq=False)
class KeptSource:
  name: str  # stem of the file
  scorable: int  # ranked rollouts
  dropped: int  # rollouts ranked high enough but invalid (`paper` order only)
  lines: np.ndarray  # int32[kept], 0-based line numbers, increasing


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
  """One selection: the parameters of `rule.Rule`, the score table and the kept rollouts."""

  strategy: str
  fraction: float | None
  count: int | None
  alpha: float
  order: str
  scope: str
  seed: int
  tau: float
  unmeasured: str
  corpus_digest: str  # "" if the score table has none
  table_checksum: str
  sources: tuple[KeptSource, ...]  # in file-name order
  reliability_if_no_positive: float = 1.0  # "none_positive" in the file
  placeholders: str = "removed"  # or "kept": image placeholders in the questions that were written

  def __len__(self) -> int:
    return sum(source.lines.size for source in self.sources)

  @property
  def digest(self) -> str:
    head = self._head()
    del head["placeholders"]  # they say nothing about what is kept
    if head["none_positive"] == 1:  # manifests written before the setting existed lack it
      del head["none_positive"]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for source in self.sources:
      digest.update(source.lines.astype("<i4", copy=False).data)
    return digest.hexdigest()

  def _head(self) -> dict[str, Any]:
    head = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    head["none_positive"] = head.pop("reliability_if_no_positive")
    head["sources"] = {
      s.name: {"scorable": s.scorable, "kept": s.lines.size, "dropped": s.dropped}
      for s in self.sources
    }
    return {"rollouts": len(self)} | head

  def save(self, path: epath.PathLike) -> None:
    head = self._head() | {"digest": self.digest}
    with files.replacing(path) as file:
      file.write(json.dumps(head, indent=1, ensure_ascii=False).encode()[:-2])
      file.write(b',\n "lines": {')
      for at, source in enumerate(self.sources):
        file.write(b",\n  " if at else b"\n  ")
        file.write(msgspec.json.encode(source.name) + b": ")
        file.write(msgspec.json.encode(source.lines.tolist()))
      file.write(b"\n }\n}\n")

  @classmethod
  def load(cls, path: epath.PathLike) -> "Manifest":
    """Reads a manifest; ManifestError if it is not one or does not match its own digest."""
    try:
      held = msgspec.json.decode(epath.Path(path).read_bytes())
      digest, lines = held.pop("digest"), held.pop("lines")
      del held["rollouts"]
      held["reliability_if_no_positive"] = held.pop("none_positive", 1.0)
      held["sources"] = tuple(
        KeptSource(name, counts["scorable"], counts["dropped"], np.array(lines[name], np.int32))
        for name, counts in held["sources"].items()
      )
      manifest = cls(**held)
      intact = manifest.digest == digest
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
      raise ManifestError(f"{path} is not a manifest ({error}): select again") from error
    if not intact:
      raise ManifestError(f"{path} was changed after it was written: select again")
    return manifest

  def rollout_indices(self, corpus: Any) -> np.ndarray:
    """Returns int64[kept], indices of the kept rollouts in a prepared corpus, in file order.

    Raises ManifestError if the corpus is not the manifest's, or lacks a kept rollout.
    """
    if corpus.digest != self.corpus_digest:
      raise ManifestError(
        f"the manifest was made from corpus {self.corpus_digest or '(unnamed)'}, but this is "
        f"corpus {corpus.digest}: select again from this corpus"
      )
    table = corpus.score_table
    indices = [np.zeros(0, np.int64)]
    for source in self.sources:
      if not source.lines.size:
        continue
      if source.name not in table.source_names:
        raise ManifestError(f"the corpus has no source {source.name!r}: select again from it")
      rows = table.rows_of(table.source_names.index(source.name))
      stored = table.rollout[rows] >= 0
      lines, rollouts = table.line[rows][stored], table.rollout[rows][stored]
      missing = np.setdiff1d(source.lines, lines)
      if missing.size:
        raise ManifestError(
          f"{source.name}:{missing[0]} is kept by the manifest but not stored in the corpus (rejected as "
          "invalid): select again with order=strict"
        )
      indices.append(rollouts[np.searchsorted(lines, source.lines)])
    return np.concatenate(indices)
