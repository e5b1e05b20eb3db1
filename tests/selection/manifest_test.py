"""A manifest lists what was kept, detects changes, and fits one corpus only."""

import dataclasses
import json

import numpy as np
import pytest

from bis_jax.selection.manifest import KeptSource, Manifest, ManifestError
from bis_jax.selection.rule import select


@dataclasses.dataclass
class Corpus:
  digest: str
  score_table: object


@pytest.fixture
def table(table_of):
  rollouts = [[1.0, 0.0], [1.0], [0.5, 0.0], [0.25], [1.0, 0.0], [0.5]]
  return table_of(
    rollouts,
    source=[0, 0, 0, 1, 1, 1],
    line=[0, 2, 3, 0, 1, 7],
    names=("a", "b"),
    rollout=[0, 1, -1, 2, 3, 4],
    digest="corpus-1",
  )


def test_saved_manifest_comes_back_whole(tmp_path, table):
  manifest = select(table, strategy="bis", fraction=0.5)
  manifest.save(tmp_path / "manifest.json")
  loaded = Manifest.load(tmp_path / "manifest.json")
  assert loaded.digest == manifest.digest
  assert [s.lines.tolist() for s in loaded.sources] == [s.lines.tolist() for s in manifest.sources]
  assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_digest_follows_every_part(table):
  manifest = select(table, strategy="bis", fraction=0.5)
  first, *rest = manifest.sources
  other = dataclasses.replace(first, lines=first.lines + 1)
  digests = {
    m.digest
    for m in (
      manifest,
      dataclasses.replace(manifest, alpha=0.05),
      dataclasses.replace(manifest, scope="global"),
      dataclasses.replace(manifest, reliability_if_no_positive=0.0),
      dataclasses.replace(manifest, corpus_digest="corpus-2"),
      dataclasses.replace(manifest, sources=(other, *rest)),
    )
  }
  assert len(digests) == 6


def test_a_manifest_from_before_a_setting_is_read_as_its_default(tmp_path, table):
  manifest = select(table, strategy="bis", fraction=0.5)
  assert manifest.digest == "b71759d60fd9c4dbf208639d4a40773664d4d6b4494077c038bbaf90595b0254"
  manifest.save(tmp_path / "manifest.json")
  held = json.loads((tmp_path / "manifest.json").read_text())
  assert (held.pop("none_positive"), held["scope"]) == (1.0, "per_source")
  (tmp_path / "manifest.json").write_text(json.dumps(held))
  assert Manifest.load(tmp_path / "manifest.json").digest == manifest.digest


@pytest.mark.parametrize(
  ("old", "new"), [('"alpha": 0.2', '"alpha": 0.3'), ('"a": [0]', '"a": [2]'), ("{", "["), ("", "")]
)
def test_altered_manifest_is_refused(tmp_path, table, old, new):
  select(table, strategy="bis", fraction=0.5).save(tmp_path / "manifest.json")
  text = (tmp_path / "manifest.json").read_text()
  assert old in text
  altered = text.replace(old, new, 1) if old else text[: len(text) // 2]
  (tmp_path / "manifest.json").write_text(altered)
  with pytest.raises(ManifestError, match="manifest.json .*select again"):
    Manifest.load(tmp_path / "manifest.json")


def test_rollout_indices_point_into_the_corpus(table):
  manifest = select(table, strategy="bis", count=1)
  assert [s.lines.tolist() for s in manifest.sources] == [[0], [1]]
  assert manifest.rollout_indices(Corpus("corpus-1", table)).tolist() == [0, 3]


def test_manifest_of_another_corpus_is_refused(table):
  manifest = select(table, strategy="bis", count=1)
  with pytest.raises(ManifestError, match="corpus-1, but this is corpus corpus-2: select again"):
    manifest.rollout_indices(Corpus("corpus-2", table))


def test_kept_rollout_that_is_not_stored_is_named(table):
  manifest = select(table, strategy="full", fraction=1.0)
  with pytest.raises(ManifestError, match="a:3 is kept .* order=strict"):
    manifest.rollout_indices(Corpus("corpus-1", table))
  unknown = dataclasses.replace(manifest, sources=(KeptSource("z", 1, 0, np.array([0], np.int32)),))
  with pytest.raises(ManifestError, match="no source 'z'"):
    unknown.rollout_indices(Corpus("corpus-1", table))
