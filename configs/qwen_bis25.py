"""Qwen2.5-VL-7B on the 25 % of each source with the highest BIS: 275 steps of 512 rollouts.

Source: arXiv 2602.04145, which gives figures of this selection for InternVL2.5-8B only.
Hardware: TPU v5e 8x8, 0.09 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/qwen_bis25.py --workdir=gs://BUCKET/qwen_bis25
  python -m bis_jax.main --config=configs/qwen_bis25.py:toy --workdir=runs/qwen_bis25_toy
"""

from configs import common


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.get_config()
  c.selection.strategy = "bis"
  c.selection.fraction = 0.25
  c.selection.alpha = 0.05
  return common.in_form(c, form)
