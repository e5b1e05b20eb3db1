"""Qwen2.5-VL-7B on all of VisualPRM400K-v1.1-Raw: 1,104 steps of 512 rollouts.

Source: arXiv 2602.04145, which gives figures of this selection for InternVL2.5-8B only.
Hardware: TPU v5e 8x8, 0.36 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/qwen_full.py --workdir=gs://BUCKET/qwen_full
  python -m bis_jax.main --config=configs/qwen_full.py:toy --workdir=runs/qwen_full_toy
"""

from configs import common


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.get_config()
  return common.in_form(c, form)
