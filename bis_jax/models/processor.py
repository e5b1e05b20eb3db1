"""The processor of a backbone: tokenizer, prompt formatter and image preprocessor.

Training, evaluation and scoring use the same.
"""

import dataclasses

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from bis_jax.inputs import internvl_prompt, prompt
from bis_jax.inputs.images import QwenImages
from bis_jax.inputs.tiles import InternVLImages
from bis_jax.models import backbones


@dataclasses.dataclass(frozen=True)
class Processor:
  """Tokenizer (with the step marker), prompt formatter and image preprocessor of a backbone."""

  tokenizer: PreTrainedTokenizerBase | internvl_prompt.TextTokenizer
  prompt: prompt.QwenPrompt | internvl_prompt.InternVLPrompt
  images: QwenImages | InternVLImages


def make_processor(config: ConfigDict, folder: str) -> Processor:
  """Returns the processor of a config's backbone, with the tokenizer in `folder` (or of a hub id).

  Raises:
    OSError, ValueError: there is no tokenizer, or it is another backbone's.
  """
  separator, images = config.inputs.separator, image_rule(config)
  if config.model.backbone == "internvl":
    tokenizer = internvl_prompt.load_tokenizer(folder)
    system = config.inputs.system or internvl_prompt.SYSTEM
    formatter = internvl_prompt.InternVLPrompt(tokenizer, separator=separator, system=system)
  else:
    tokenizer = prompt.load_tokenizer(folder)
    formatter = prompt.QwenPrompt(tokenizer, separator=separator)
  return Processor(tokenizer, formatter, images)


def image_rule(config: ConfigDict) -> QwenImages | InternVLImages:
  """Returns what a config's backbone makes of images; needs no tokenizer."""
  if config.model.backbone == "internvl":
    model = backbones.model_config(config.model, vocab_size=1)
    return InternVLImages(config.inputs.max_tiles, model.vision.image_size)
  return QwenImages(config.inputs.min_pixels, config.inputs.max_pixels)
