"""How a backbone reads text and images: the same for training, evaluation and scoring."""

import dataclasses

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from bis_jax.inputs import internvl_prompt, prompt
from bis_jax.inputs.images import QwenImages
from bis_jax.inputs.tiles import InternVLImages
from bis_jax.models import backbones


@dataclasses.dataclass(frozen=True)
class Reader:
  """What turns questions, steps and images into tokens and patches.

  Attributes:
    tokenizer: with the step marker.
    prompt: the formatter.
    images: the image rule.
  """

  tokenizer: PreTrainedTokenizerBase | internvl_prompt.TextTokenizer
  prompt: prompt.QwenPrompt | internvl_prompt.InternVLPrompt
  images: QwenImages | InternVLImages


def make_reader(config: ConfigDict, folder: str) -> Reader:
  """Returns the reader of a config's backbone, with the tokenizer in `folder` (or of a hub id).

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
  return Reader(tokenizer, formatter, images)


def image_rule(config: ConfigDict) -> QwenImages | InternVLImages:
  """Returns what a config's backbone makes of images; needs no tokenizer."""
  if config.model.backbone == "internvl":
    model = backbones.model_config(config.model, vocab_size=1)
    return InternVLImages(config.inputs.max_tiles, model.vision.image_size)
  return QwenImages(config.inputs.min_pixels, config.inputs.max_pixels)
