"""Qwen3-VL-8B on the 10 % of each source with the highest BIS: 110 steps of 512 rollouts.

The paper has no Qwen3-VL: this is its recipe for Qwen2.5-VL-7B with other weights.
Hardware: TPU v5e 8x8, 0.03 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/qwen3vl_bis10.py --workdir=gs://BUCKET/qwen3vl_bis10
  python -m bis_jax.main --config=configs/qwen3vl_bis10.py:toy --workdir=runs/qwen3vl_bis10_toy
"""

from configs import common, qwen_bis10


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = qwen_bis10.get_config()
  c = common.use_backbone(c, "qwen3_vl", "8b", "Qwen/Qwen3-VL-8B-Instruct")
  c = common.in_form(c, form)
  if form == "toy":
    c.train.epochs = 4  # it learns to look later than the toy Qwen2.5-VL
  return c
