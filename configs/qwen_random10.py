"""Qwen2.5-VL-7B on a random 10 % of every source: the baseline of qwen_bis10.

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
