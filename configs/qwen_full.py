"""Qwen2.5-VL-7B on all of VisualPRM400K-v1.1-Raw: the line that 10 % has to reach.

python -m bis_jax.main --config=configs/qwen_full.py --workdir=gs://BUCKET/qwen_full
python -m bis_jax.main --config=configs/qwen_full.py:toy --workdir=runs/qwen_full_toy
"""

from configs import common


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.get_config()
  return common.in_form(c, form)
