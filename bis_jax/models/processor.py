"""The processor of a run's backbone: the same in training, evaluation and scoring."""

from ml_collections import ConfigDict

from bis_jax import files
from bis_jax.inputs.images import ImageProcessor
from bis_jax.models import backbones
from bis_jax.models.backbone import Processor
from bis_jax.models.backbones import BackboneError

TOKENIZER_FILES = ("*.json", "*.txt", "*.jinja", "*.model")  # the last is SentencePiece's


def make_processor(config: ConfigDict, folder: str) -> Processor:
  """Returns the processor of a config's backbone, with the tokenizer in `folder` (or of a hub id).

  Raises BackboneError if there is no tokenizer, or it is another backbone's.
  """
  backbone = backbones.get(config.model.backbone)
  try:
    with files.read_locally(folder, *TOKENIZER_FILES) as local:
      tokenizer = backbone.load_tokenizer(str(local))
  except Exception as error:  # other and damaged files raise many types
    raise BackboneError(
      f"{folder} holds no tokenizer for {backbone.name}: set config.inputs.tokenizer to the one of its "
      f"weights ({str(error).splitlines()[0]})"
    ) from error
  prompt = backbone.make_prompt(tokenizer, config.inputs.separator, config[backbone.name])
  return Processor(tokenizer, prompt, image_processor(config))


def image_processor(config: ConfigDict) -> ImageProcessor:
  """Returns the image preprocessor of a config's backbone; needs no tokenizer."""
  backbone = backbones.get(config.model.backbone)
  return backbone.make_images(backbone.sizes[config.model.size], config[backbone.name])
