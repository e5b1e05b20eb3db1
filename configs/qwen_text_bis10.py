"""Qwen2.5-VL-7B on the 10 % of Math-Shepherd with the highest BIS: rollouts of text alone.

Math-Shepherd's labels are hard, so BIS ranks by mixture alone. No program has a vision tower.
Evaluated on ProcessBench. Hardware and figure: not measured.

  python -m bis_jax.main --config=configs/qwen_text_bis10.py --workdir=gs://BUCKET/qwen_text_bis10
  python -m bis_jax.main --config=configs/qwen_text_bis10.py:toy --workdir=runs/qwen_text_bis10_toy
"""

from configs import common


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy", in which questions describe the pictures."""
  c = common.get_config()
  c.corpus.annotations, c.corpus.images = "peiyi9979/Math-Shepherd", ""
  c.corpus.toy.described = True
  c.selection.strategy = "bis"
  c.selection.fraction = 0.10
  c.selection.alpha = 0.2
  c.model.learning_rates = ((r"visual\.", 0.0), (r".*", 1.0))
  c.evaluation.benchmark = "data/ProcessBench"
  c = common.in_form(c, form)
  c.pretrain.steps = 0  # there are no pictures to caption
  c.evaluation.blank_images = False
  return c
