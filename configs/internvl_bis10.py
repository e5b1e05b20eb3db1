"""InternVL2.5-8B on the 10 % of each source with the highest BIS: 110 steps of 512 rollouts.

Expected (arXiv 2602.04145): overall_source_weighted 65.46 on
VisualProcessBench, threshold tuned on test.
Hardware: TPU v5e 8x8, 0.09 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/internvl_bis10.py --workdir=gs://BUCKET/internvl_bis10
  python -m bis_jax.main --config=configs/internvl_bis10.py:toy --workdir=runs/internvl_bis10_toy
"""

from configs import common, qwen_bis10


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.use_backbone(qwen_bis10.get_config(), "internvl", "2.5-8b", "OpenGVLab/InternVL2_5-8B")
  return common.in_form(c, form)
