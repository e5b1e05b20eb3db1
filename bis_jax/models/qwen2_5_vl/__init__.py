"""Qwen2.5-VL in Flax NNX."""

from bis_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig as Qwen2_5_VLConfig
from bis_jax.models.qwen2_5_vl.config import TextConfig as TextConfig
from bis_jax.models.qwen2_5_vl.config import VisionConfig as VisionConfig
from bis_jax.models.qwen2_5_vl.model import Qwen2_5_VL as Qwen2_5_VL
