"""InternVL2.5-8B on the 10 % of each source with the highest BIS, with LoRA on one GPU of 80 GB.

As `qwen_bis10_lora`.

  python -m bis_jax.main --config=configs/internvl_bis10_lora.py --workdir=runs/internvl_bis10_lora
  python -m bis_jax.main --config=configs/internvl_bis10_lora.py:toy --workdir=runs/internvl_lora_toy
"""

from configs import common, internvl_bis10


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  return common.with_lora(internvl_bis10.get_config(), form)
