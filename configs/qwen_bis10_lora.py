"""Qwen2.5-VL-7B on the 10 % of each source with the highest BIS, with LoRA on one GPU of 80 GB.

Adapters of rank 16 on every kernel of the decoder, whose parameters are frozen in bfloat16; the
step marker's row, the reward head and the projector train. Rows of 4096 tokens, one per micro-batch.
With --config.model.frozen_dtype=nf4 it is QLoRA, on one GPU of 24 GB.
Expected: not measured at this size; the toy form is as good as the full run (docs/training.md).

  python -m bis_jax.main --config=configs/qwen_bis10_lora.py --workdir=runs/qwen_bis10_lora
  python -m bis_jax.main --config=configs/qwen_bis10_lora.py:toy --workdir=runs/qwen_bis10_lora_toy
"""

from configs import common, qwen_bis10


def get_config(form: str = ""):
  """Returns the recipe, or its form "toy"."""
  return common.with_lora(qwen_bis10.get_config(), form)
