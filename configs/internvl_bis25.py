"""InternVL2.5-8B on the 25 % of each source with the highest BIS: 275 steps of 512 rollouts.

Expected (arXiv 2602.04145): overall_source_weighted 65.46 (3 seeds: 65.38 +- 0.13) on
VisualProcessBench, threshold tuned on test.
Hardware: TPU v5e 8x8, 0.22 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/internvl_bis25.py --workdir=gs://BUCKET/internvl_bis25
  python -m bis_jax.main --config=configs/internvl_bis25.py:toy --workdir=runs/internvl_bis25_toy
"""

from configs import common, qwen_bis25


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.use_backbone(qwen_bis25.get_config(), "internvl", "2.5-8b", "OpenGVLab/InternVL2_5-8B")
  return common.in_form(c, form)
