"""The record of a selection: its parameters, every kept rollout, and what it was made from."""

import dataclasses
import hashlib
import json
from typing import Any

import msgspec
import numpy as np

from bis_jax.corpus.score_table import as_path
from bis_jax.errors import UserError


class ManifestError(UserError):
  """A manifest that is damaged, or that does not fit its corpus."""


@dataclasses.dataclass(frozen=True, eq=False)
class KeptSource:
  """What was kept of one annotation file.

  Attributes:
    name: the file's stem.
    scorable: rollouts that were ranked.
    dropped: rollouts ranked high enough but invalid (`paper` order only).
    lines: int32[kept], 0-based line numbers, rising.
  """

  name: str
  scorable: int
  dropped: int
  lines: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
  """One selection; the parameters are those of `cut.Rule`.

  Attributes:
    tau: threshold of a positive step in the score table.
    unmeasured: how the score table counts steps without continuations.
    corpus_digest: names the corpus; "" if the table has no name for it.
    table_checksum: of the statistics that decided.
    sources: in file-name order.
  """

  strategy: str
  fraction: float | None
  count: int | None
  alpha: float
  order: str
  scope: str
  seed: int
  tau: float
  unmeasured: str
  corpus_digest: str
  table_checksum: str
  sources: tuple[KeptSource, ...]
  none_positive: float = 1.0

  def __len__(self) -> int:
    return sum(source.lines.size for source in self.sources)

  @property
  def digest(self) -> str:
    """Returns 64 hex digits of everything in the manifest."""
    head = self._head()
    if head["none_positive"] == 1:  # as manifests have it that were written before the setting
      del head["none_positive"]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for source in self.sources:
      digest.update(np.ascontiguousarray(source.lines, "<i4"))
    return digest.hexdigest()

  def _head(self) -> dict[str, Any]:
    head = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    head["sources"] = {
      s.name: {"scorable": s.scorable, "kept": s.lines.size, "dropped": s.dropped}
      for s in self.sources
    }
    return {"rollouts": len(self)} | head

  def save(self, path: Any) -> None:
    """Writes the manifest as JSON, the kept lines of a source on one line; whole or not at all.

    `path` is a local path, or an epath.Path for gs://.
    """
    path = as_path(path)
    part = path.with_name(path.name + ".part")
    head = self._head() | {"digest": self.digest}
    with part.open("wb") as file:
      file.write(json.dumps(head, indent=1, ensure_ascii=False).encode()[:-2])
      file.write(b',\n "lines": {')
      for i, source in enumerate(self.sources):
        file.write(b",\n  " if i else b"\n  ")
        file.write(msgspec.json.encode(source.name) + b": ")
        file.write(msgspec.json.encode(source.lines.tolist()))
      file.write(b"\n }\n}\n")
    part.replace(path)

  @classmethod
  def load(cls, path: Any) -> "Manifest":
    """Reads a manifest and checks that nothing in it was changed.

    Raises:
      FileNotFoundError: there is no such file.
      ManifestError: the file is no manifest, or does not match its own digest.
    """
    try:
      held = msgspec.json.decode(as_path(path).read_bytes())
      digest, lines = held.pop("digest"), held.pop("lines")
      del held["rollouts"]
      held["sources"] = tuple(
        KeptSource(name, counts["scorable"], counts["dropped"], np.array(lines[name], np.int32))
        for name, counts in held["sources"].items()
      )
      manifest = cls(**held)
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError, OverflowError) as error:
      raise ManifestError(f"{path} is no manifest ({error}): select again") from error
    if manifest.digest != digest:
      raise ManifestError(f"{path} was changed after it was written: select again")
    return manifest

  def rollout_indices(self, corpus: Any) -> np.ndarray:
    """Returns int64[kept], in file order: where the kept rollouts lie in a prepared corpus.

    Args:
      corpus: has `digest` and `score_table`.

    Raises:
      ManifestError: the corpus is not the one that was selected from, or does not store a kept
        rollout.
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
