"""Qwen2.5-VL-3B on the 10 % of each source with the highest BIS: 110 steps of 512 rollouts.

Expected: not measured; the paper trains the 7B model alone.

  python -m bis_jax.main --config=configs/qwen_3b_bis10.py --workdir=gs://BUCKET/qwen_3b_bis10
  python -m bis_jax.main --config=configs/qwen_3b_bis10.py:toy --workdir=runs/qwen_3b_bis10_toy
"""

from configs import common, qwen_bis10


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = qwen_bis10.get_config()
  c.model.size, c.model.checkpoint = "3b", "Qwen/Qwen2.5-VL-3B-Instruct"
  return common.in_form(c, form)
