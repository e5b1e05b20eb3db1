"""InternVL2.5 and InternVL3 in Flax NNX."""

from bis_jax.models.internvl.config import InternVLConfig as InternVLConfig
from bis_jax.models.internvl.config import TextConfig as TextConfig
from bis_jax.models.internvl.config import VisionConfig as VisionConfig
from bis_jax.models.internvl.model import InternVL as InternVL
