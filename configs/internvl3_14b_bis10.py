"""InternVL3-14B on the 10 % of each source with the highest BIS: 110 steps of 512 rollouts.

Expected (arXiv 2602.04145): overall_source_weighted 66.05 (all data: 65.80) on
VisualProcessBench, threshold tuned on test.
Hardware: TPU v5p 2x2x4, 0.28 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/internvl3_14b_bis10.py --workdir=gs://BUCKET/internvl3_14b_bis10
  python -m bis_jax.main --config=configs/internvl3_14b_bis10.py:toy --workdir=runs/internvl3_14b_bis10_toy
"""

from configs import common, qwen_bis10


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.use_backbone(qwen_bis10.get_config(), "internvl", "3-14b", "OpenGVLab/InternVL3-14B")
  return common.in_form(c, form)
