"""Qwen2.5-VL-7B on a random 10 % of each source: 110 steps of 512 rollouts.

The baseline of qwen_bis10, which is 4.1 % better (relative; arXiv 2602.04145, abstract).
Hardware: TPU v5e 8x8, 0.04 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/qwen_random10.py --workdir=gs://BUCKET/qwen_random10
  python -m bis_jax.main --config=configs/qwen_random10.py:toy --workdir=runs/qwen_random10_toy
"""

from configs import common


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.get_config()
  c.selection.strategy = "random"
  c.selection.fraction = 0.10
  return common.in_form(c, form)
