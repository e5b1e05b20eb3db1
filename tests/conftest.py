"""Eight fake CPU devices, strict ranks and exact float32 products in every test.

Compilation is at its lowest optimisation level: the suite compiles far more than it computes.
"""

import os
import pathlib

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (the flags above must be set before jax is imported)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of real tokenizers and images beside the checkout; skips where it is absent."""
  folder = pathlib.Path(__file__).resolve().parents[2] / "shared"
  if not folder.is_dir():
    pytest.skip("reads real tokenizers and images from ../shared, which is not here")
  return folder


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
  """The toy recipe on a thousand rollouts with the smallest model: a run of seconds."""
  from configs import qwen_bis10

  c = qwen_bis10.get_config("toy")
  c.corpus.cache = str(tmp_path_factory.mktemp("cache"))
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 1000, 300, 24
  c.model.size = "tiny"
  c.pretrain.steps = 2
  c.train.global_batch, c.train.epochs, c.train.steps = 8, 2, 6
  c.train.log_every, c.train.checkpoint_every = 1, 2
  c.evaluation.blank_images, c.evaluation.every, c.evaluation.dev_rollouts = False, 0, 0
  return c.lock()
