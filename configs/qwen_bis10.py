"""Qwen2.5-VL-7B on the 10 % of each source with the highest BIS: 110 steps of 512 rollouts.

Expected (arXiv 2602.04145): overall_source_weighted 64.63 on
VisualProcessBench, threshold tuned on test.
Hardware: TPU v5e 8x8, 0.04 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/qwen_bis10.py --workdir=gs://BUCKET/qwen_bis10
  python -m bis_jax.main --config=configs/qwen_bis10.py:toy --workdir=runs/qwen_bis10_toy
"""

from configs import common


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.get_config()
  c.selection.strategy = "bis"
  c.selection.fraction = 0.10
  c.selection.alpha = 0.2
  return common.in_form(c, form)
