"""Preparing a corpus on Apache Beam: the same records and digest as on this machine."""

import pickle
import sys

import pytest

from bis_jax.corpus import workers
from bis_jax.corpus.preparation import prepare
from bis_jax.corpus.rejections import CorpusError
from bis_jax.corpus.workers import BeamWorkers


def _double(number: int) -> int:
  if number < 0:
    raise CorpusError(f"{number} is negative")
  return 2 * number


@pytest.mark.parametrize("task", [4, -1])
def test_a_task_leaves_its_result_or_its_error(tmp_path, task):
  place = tmp_path / "000000"
  place.write_bytes(pickle.dumps((_double, task)))
  for _ in range(2):  # Beam may run it again
    workers._run_task(str(place))
  result = pickle.loads((tmp_path / "000000.result").read_bytes())
  assert str(result) == ("8" if task > 0 else "-1 is negative")
  assert {path.name for path in tmp_path.iterdir()} == {"000000", "000000.result"}


def test_beam_that_is_not_installed_is_told(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(CorpusError, match=r"pip install 'bis_jax\[beam\]'"):
    BeamWorkers([], tmp_path / "scratch")


def test_results_come_in_the_order_of_the_tasks(tmp_path):
  pytest.importorskip("apache_beam", reason="needs the extra `beam`")
  done = []
  with BeamWorkers([], tmp_path / "out") as pool:
    assert pool.map(_double, [3, 1, 2], done.append) == [6, 2, 4] == done
    with pytest.raises(CorpusError, match="-1 is negative"):
      pool.map(_double, [3, -1])
  assert list(tmp_path.iterdir()) == []


def test_the_corpus_is_the_same(write_files, record_of, line_of, png, tmp_path):
  pytest.importorskip("apache_beam", reason="needs the extra `beam`")
  lines = [line_of(record_of((at / 16,), image=f"geo/{at % 2}.png")) for at in range(5)]
  raw = write_files(
    {"a/x.jsonl": b"\n".join([*lines, b"oops"]), "a/y.jsonl": lines[0]}
    | {"i/geo/0.png": png(3, 4), "i/geo/1.png": png(5, 6)}
  )
  here = prepare(raw / "a", raw / "i", tmp_path / "here", max_rejected_fraction=0.2)
  beam = prepare(raw / "a", raw / "i", tmp_path / "beam", max_rejected_fraction=0.2, beam=[])
  assert beam.digest == here.digest and beam.stats == here.stats
  assert [beam.rollout(i) for i in range(6)] == [here.rollout(i) for i in range(6)]
  assert [beam.image(i) for i in range(2)] == [here.image(i) for i in range(2)]
  assert {path.name for path in tmp_path.iterdir()} == {"raw", "here", "beam"}
