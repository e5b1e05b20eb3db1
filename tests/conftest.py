"""Eight fake CPU devices, strict ranks and exact float32 products in every test."""

import os
import pathlib

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
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
