"""A toy Qwen2.5-VL on the 10 % of the toy corpus with the highest BIS: the main job of CI.

Hardware: two CPU cores, about four minutes.

  python -m bis_jax.main --config=configs/toy_bis10.py --workdir=runs/toy_bis10
"""

from configs import qwen_bis10


def get_config():
  """Returns the recipe `qwen_bis10` in its form "toy"."""
  return qwen_bis10.get_config("toy")
