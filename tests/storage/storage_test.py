"""Paths on object stores: which ones open, and what is shown if they do not."""

import importlib
import os
import sys
import threading

import gcsfs
import pytest
from etils import epath

from bis_jax import files
from bis_jax.errors import UserError


def test_a_bucket_is_written_read_in_part_listed_and_emptied(bucket, bucket_server):
  (bucket / "a" / "big").write_bytes(bytes(6 << 20) + b"end")
  (bucket / "b").write_text("text")
  before = len(bucket_server.log)
  with (bucket / "a" / "big").open("rb") as file:
    file.seek(6 << 20)
    assert file.read() == b"end"
  assert sum(size for _, name, size in bucket_server.log[before:] if "big" in name) < 2000
  assert sorted(path.name for path in bucket.iterdir()) == ["a", "b"]
  (bucket / "b").replace(bucket / "a" / "c")
  assert sorted(path.name for path in (bucket / "a").iterdir()) == ["big", "c"]
  assert not (bucket / "b").exists()
  bucket.rmtree()
  assert not bucket.exists()


def test_what_another_process_writes_is_seen(bucket, bucket_server):
  (bucket / "a").write_text("1")
  assert [path.name for path in bucket.iterdir()] == ["a"]
  bucket_server.write("bis-jax", f"{bucket.name}/b", b"2")
  assert [path.name for path in bucket.iterdir()] == ["a", "b"]


def test_a_bucket_opens_in_a_forked_process(bucket):
  (bucket / "a").write_text("1")
  read, write = os.pipe()
  if not (child := os.fork()):
    os.write(write, (bucket / "a").read_bytes())
    os._exit(0)
  alarm = threading.Timer(20, os.kill, (child, 9))
  alarm.start()
  assert os.waitpid(child, 0)[1] == 0
  alarm.cancel()
  assert os.read(read, 10) == b"1"


def test_a_short_failure_of_the_bucket_is_survived(bucket, bucket_server):
  with bucket_server.failing(name="short", status=503, times=1):
    (bucket / "short").write_text("a")
  with bucket_server.failing(name="short", cut=True, times=1):
    assert (bucket / "short").read_text() == "a"


def test_a_bucket_that_is_missing_or_closed_is_one_sentence(bucket_server, monkeypatch):
  for use in (
    lambda: files.write_text("gs://nowhere/a", "text"),
    lambda: files.refuse_overwriting({"--out": "gs://nowhere/a"}, {}),
  ):
    with pytest.raises((OSError, UserError), match="there is no bucket gs://nowhere"):
      use()
  bucket_server.make_bucket("closed")
  monkeypatch.setattr(bucket_server, "forbidden", {"closed"})
  for use in (
    lambda: files.write_text("gs://closed/a", "text"),
    lambda: files.refuse_overwriting({"--out": "gs://closed/a"}, {}),
    lambda: epath.Path("gs://closed/a").read_text(),
  ):
    with pytest.raises(PermissionError, match="Forbidden: this account may not use gs://closed: "):
      use()


def test_a_bucket_that_stays_away_is_one_sentence(bucket, bucket_server, monkeypatch):
  async def at_once(_):
    pass

  monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", at_once)
  with bucket_server.failing(name="away", status=503):
    with pytest.raises(
      ConnectionError, match=r"gs://bis-jax can't be reached \(failure 503.*again"
    ):
      (bucket / "away").read_text()
    for ask in ("exists", "is_file", "is_dir"):
      with pytest.raises(ConnectionError, match=r"gs://bis-jax can't be reached"):
        getattr(bucket / "away", ask)()
    with pytest.raises(ConnectionError, match=r"gs://bis-jax can't be reached"):
      files.write_text(bucket / "away", "text")


def test_other_urls_and_missing_packages_are_one_sentence(monkeypatch):
  with pytest.raises(
    UserError, match=r"memory://a can't be opened: a path is local or starts with"
  ):
    files.absolute("memory://a")
  with pytest.raises(UserError, match="package to open s3://a/b is missing: Install s3fs"):
    files.absolute("s3://a/b")

  registry = importlib.import_module("fsspec.registry")  # fsspec.registry is its content
  monkeypatch.delitem(registry._registry, "gs", raising=False)
  monkeypatch.setitem(sys.modules, "bis_jax.storage.gcs", None)
  with pytest.raises(UserError, match=r"to open gs://a/b is missing: pip install 'bis_jax\[gcs\]'"):
    files.absolute("gs://a/b")
  assert files.absolute("a") == epath.Path(os.path.abspath("a"))
