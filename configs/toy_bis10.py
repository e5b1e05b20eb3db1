"""BIS 10 % on the toy corpus with a toy Qwen2.5-VL: the main job, whole, on two CPU cores.

python -m bis_jax.main --config=configs/toy_bis10.py --workdir=runs/toy_bis10
"""

from configs import qwen_bis10


def get_config():
  """Returns the recipe `qwen_bis10` in its form "toy"."""
  return qwen_bis10.get_config("toy")
