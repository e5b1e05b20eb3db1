"""Whole runs whose every path is in a bucket."""

import pytest

from bis_jax.run import stages


@pytest.fixture(scope="module")
def configs(small_config, bucket_server, tmp_path_factory):
  """The same small run, with its cache on disk and in a bucket."""
  made = []
  for cache in (str(tmp_path_factory.mktemp("cache")), "gs://bis-jax/bucket_run/cache"):
    c = small_config.copy_and_resolve_references()
    with c.unlocked():
      c.corpus.cache = cache
      c.corpus.toy.benchmark_items = 18
      c.corpus.workers = 1
      c.evaluation.dev_rollouts = 8
    made.append(c)
  return made


def test_a_run_in_a_bucket_is_that_on_a_disk(configs, tmp_path):
  on_disk, in_bucket = configs
  stages.run(on_disk, str(tmp_path / "run"))
  stages.run(in_bucket, "gs://bis-jax/bucket_run/run")
