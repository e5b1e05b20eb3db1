"""The paper's recipe, on which all others build.

Every key, with its default, toy value, range, unit and meaning: bis_jax/settings/keys.py. A recipe
changes only what differs and ends in `in_form()`, so that `--config=configs/RECIPE.py:toy` is the
same recipe on the toy corpus.
"""

from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.models import backbones
from bis_jax.models.backbone import VISION_TOWER
from bis_jax.models.model_config import LORA
from bis_jax.settings.keys import all_settings, nest


def get_config() -> ConfigDict:
  """Returns the paper's recipe on the full released corpus, Qwen2.5-VL-7B."""
  return nest({key: setting.default for key, setting in all_settings().items()})


def use_backbone(c: ConfigDict, name: str, size: str, checkpoint: str) -> ConfigDict:
  """Returns the recipe `c` for another backbone."""
  c.model.backbone, c.model.size, c.model.checkpoint = name, size, checkpoint
  c.inputs.row_patches = backbones.get(name).row_patches
  return c


def in_form(c: ConfigDict, form: str) -> ConfigDict:
  """Returns the recipe `c` in a form: "" unchanged; "toy" with the toy values of all keys.

  The toy form takes the same path through the code on the toy corpus, with a small model that is
  first pre-trained on captions, in minutes on two CPU cores.
  """
  if form not in ("", "toy"):
    raise UserError(
      f"a recipe has no form {form!r}: use configs/RECIPE.py or configs/RECIPE.py:toy"
    )
  if form == "toy":
    backbone = backbones.get(c.model.backbone)
    for key, setting in all_settings().items():
      section = key.split(".")[0]
      if setting.toy is not None and section not in {*backbones.BACKBONES} - {backbone.name}:
        c.update_from_flattened_dict({key: setting.toy})
    c.inputs.row_patches = backbone.toy_row_patches
  return c


def with_lora(c: ConfigDict, form: str) -> ConfigDict:
  """Returns the recipe `c` in a form, with adapters on the decoder, for one GPU."""
  c.inputs.row_patches = c.inputs.row_patches * 4096 // c.inputs.row_tokens
  c.inputs.row_tokens = c.inputs.max_length = 4096
  # One row at a time on one device; on N devices set accumulate to 80 / N.
  c.inputs.row_multiple = c.train.accumulate = 80
  c = in_form(c, form)
  c.model.learning_rates = ((VISION_TOWER, 0.0), (r"language_model\.", LORA), (r".*", 1.0))
  c.model.frozen_dtype = "bfloat16"
  c.optim.learning_rate = 1e-4
  if form == "toy":
    c.optim.learning_rate, c.model.frozen_dtype = 3e-3, "float32"
  return c
