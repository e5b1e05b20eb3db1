"""Multimodal process reward models from a tenth of the data; see README.md."""

import glob
import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from bis_jax.scoring.solutions import StepRewards

__version__ = "0.1.0"  # read by pyproject.toml without importing anything

# Only Transformers' tokenizers, configs and image processors are used. Without this, every process
# that imports it advises to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Where libtpu is installed for its compiler and there is neither a TPU nor another accelerator's
# plug-in, JAX would start libtpu, which prints errors that no log level hides.
if (
  importlib.util.find_spec("libtpu")
  and not importlib.util.find_spec("jax_plugins")
  and not glob.glob("/dev/accel*")
  and not glob.glob("/dev/vfio/[0-9]*")
):
  os.environ.setdefault("JAX_PLATFORMS", "cpu")


def load(checkpoint: str, **settings: Any) -> "StepRewards":
  """Returns a reward model from a workdir, exported folder or hub id, to call as

      bis_jax.load("exported")(question, images, steps)  # probability of every step, float32[n]

  `settings` are those of `bis_jax.scoring.step_scorer.load`, such as max_length=4096.
  """
  from bis_jax.scoring.solutions import StepRewards  # here: it imports JAX

  return StepRewards(checkpoint, **settings)
