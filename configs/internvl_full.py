"""InternVL2.5-8B on all of VisualPRM400K-v1.1-Raw: 1,104 steps of 512 rollouts.

Expected (arXiv 2602.04145): overall_source_weighted 65.12 on
VisualProcessBench, threshold tuned on test.
Hardware: TPU v5e 8x8, 0.89 hours at least, by the compiler's roofline; not measured.

  python -m bis_jax.main --config=configs/internvl_full.py --workdir=gs://BUCKET/internvl_full
  python -m bis_jax.main --config=configs/internvl_full.py:toy --workdir=runs/internvl_full_toy
"""

from configs import common, qwen_full


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  c = common.use_backbone(qwen_full.get_config(), "internvl", "2.5-8b", "OpenGVLab/InternVL2_5-8B")
  return common.in_form(c, form)
