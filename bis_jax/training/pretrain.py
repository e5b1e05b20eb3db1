"""Caption pre-training of the toy corpus's backbone, which is randomly initialized.

A randomly initialized backbone only learns the label prior. It is therefore first trained on
captions of the corpus's own pictures, without steps, labels or pictures of the benchmark, which
gives it visual features. The result is a Hugging Face folder beside the corpus, from which training
starts as from a published checkpoint; all runs on the same pictures share it.

Its LM head is the embedding table except for two rows: `Yes` and `No` are in no caption, so the
loss pushes their rows the same way, and a reward head that starts from equal rows hardly learns.
They are the random reward head that the model was initialized with.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from bis_jax import files
from bis_jax.console import log, progress_bar
from bis_jax.corpus import shared
from bis_jax.errors import UserError
from bis_jax.hub import hf_folder, weights
from bis_jax.images import upright_size
from bis_jax.inputs import pipeline
from bis_jax.inputs.pipeline import Example, unlabelled
from bis_jax.inputs.rows import device_arrays
from bis_jax.models import backbones
from bis_jax.models.backbone import Processor
from bis_jax.models.param_tree import Params, merge
from bis_jax.models.processor import make_processor
from bis_jax.parallel.sharding import make_mesh, put_rows
from bis_jax.settings.locations import Locations
from bis_jax.toy import drawing
from bis_jax.training import optim
from bis_jax.training.train_state import TrainState, abstract_state, first_params, first_state
from bis_jax.training.train_step import next_token_loss

# Independent of the run: every run on the same pictures starts from the same backbone.
_OPTIM = dict(
  warmup_fraction=0.03,
  weight_decay=0.05,
  b1=0.9,
  b2=0.98,
  eps=1e-8,
  clip=1.0,
  moment_dtype="float32",
)
# Keys of `config.inputs` that decide what a batch of captions holds.
_INPUTS = ("separator", "row_patches", "row_markers", "lookahead")
# Increase it when the same settings pre-train other parameters: cached backbones are then made anew.
VERSION = 1
_CARD = """# A small {backbone} for the toy corpus of bis_jax

Pre-trained on captions of the corpus's pictures: {captions} captions in {steps} steps, last loss
{loss:.3f}, {seconds:.0f} s. It initializes reward models and has seen no step label.
"""


class DivergedError(UserError):
  """The loss of the pre-training is not finite, or has grown."""


def caption_examples(captions: epath.Path, images: epath.Path) -> list[Example]:
  """Returns captions in the form of solutions, one sentence per step, without labels.

  `captions` is JSON lines {"image": [path in `images`, ...], "question": ..., "sentences": [...]}.
  """
  examples = []
  for number, (_, caption) in enumerate(files.read_jsonl(captions)):
    paths = [images / path for path in caption["image"]]
    examples.append(
      unlabelled(
        f"caption {number}",
        caption["question"],
        caption["sentences"],
        image_sizes=list(map(upright_size, paths)),
        read_images=lambda paths=paths: [path.read_bytes() for path in paths],
      )
    )
  return examples


def backbone_folder(config: ConfigDict, drawn: epath.Path) -> epath.Path:
  """Returns the folder of a config's pre-trained backbone, beside its toy corpus in `drawn`."""
  model, inputs = config.model, config.inputs
  seen = [drawn / "captions.jsonl", drawn / "tokenizer" / "tokenizer.json"]
  key = files.digest(
    [hashlib.sha256(path.read_bytes()).hexdigest() for path in seen],
    drawing.VERSION,  # which draws the pictures
    [model[key] for key in ("backbone", "size", "dtype")],
    [inputs[key] for key in _INPUTS],
    sorted(config[model.backbone].items()),
    sorted((dict(config.pretrain) | {"seed": _seed(config)}).items()),
    _OPTIM,
    VERSION,
  )
  return drawn.with_name(f"backbone-{key}")


def base_folder(config: ConfigDict, locations: Locations) -> epath.Path | None:
  """Returns the folder of the weights that a run starts from, made or not; None: random ones."""
  if locations.checkpoint:
    return weights.find_checkpoint(locations.checkpoint)
  if not config.pretrain.steps or locations.toy is None:
    return None
  return backbone_folder(config, locations.toy)


def _seed(config: ConfigDict) -> int:
  return config.seed if config.pretrain.seed < 0 else config.pretrain.seed


def pretrain(config: ConfigDict, drawn: epath.Path, out: epath.Path) -> None:
  """Writes the pre-trained backbone as the Hugging Face folder `out`, unless it is there undamaged.

  Raises DivergedError, and publishes nothing, if the loss is not finite or has grown.
  """
  # Uses one device of this process, so its result depends neither on the mesh nor on the processes.
  make = functools.partial(_pretrain, config, drawn)
  shared.made(out, "the pre-trained backbone", {"version": VERSION}, make)


def _pretrain(config: ConfigDict, drawn: epath.Path, out: pathlib.Path) -> None:
  started = time.monotonic()
  processor = make_processor(config, str(drawn / "tokenizer"))
  captions = caption_examples(drawn / "captions.jsonl", drawn / "images")
  mesh = make_mesh(1, 1, 1, jax.local_devices()[:1])
  model = backbones.model_config(config, len(processor.tokenizer))
  model = dataclasses.replace(model, adaptation=None)

  graph, shapes = backbones.structure(model, mesh)
  files.require_room(out.parent, sum(math.prod(shape.shape) * 4 for shape in shapes.values()))
  params = first_params(model, shapes, None, processor.prompt.special, _seed(config))
  own = {"second_moment_dtype": "float32", "on_host": False}
  own["learning_rate"] = config.pretrain.learning_rate
  settings = ConfigDict(_OPTIM | own)
  optimizer = optim.optimizer(settings, config.pretrain.steps, dict.fromkeys(params, 1.0))
  state = first_state(optimizer, params, abstract_state(optimizer, shapes, mesh))
  step = _make_step(graph, optimizer)
  losses = []
  with contextlib.closing(_batches(config, captions, processor)) as batches:
    bar = progress_bar("pretrain", config.pretrain.steps, iterable=range(config.pretrain.steps))
    for done in bar:
      if done and done % 100 == 0:
        bar.set_postfix(loss=f"{float(losses[-1]):.3f}")
      state, loss = step(state, put_rows(device_arrays(next(batches)), mesh))
      losses.append(loss)
  first, last = float(losses[0]), float(losses[-1])
  finite = bool(jnp.isfinite(jax.jit(optax.tree.norm)(state.params)))
  if not finite or not last <= 2 * first:
    raise DivergedError(
      f"the pre-training of the toy backbone diverged (loss {first:.3f} in step 1, {last:.3f} in step "
      f"{len(losses)}), and nothing was saved: lower config.pretrain.learning_rate, which is "
      f"{config.pretrain.learning_rate:g}"
    )
  seconds = time.monotonic() - started
  card = _CARD.format(
    backbone=config.model.backbone,
    captions=len(captions),
    steps=config.pretrain.steps,
    loss=last,
    seconds=seconds,
  )
  hf_folder.write(
    out, state.params, model, processor, base=None, dtype="float32", card=card, tied=True
  )
  log.info("pre-trained the backbone in %.0f s, last loss %.3f", seconds, last)


def _batches(
  config: ConfigDict, captions: Sequence[Example], processor: Processor
) -> pipeline.BatchIterator:
  # Every pass is shuffled anew.
  own = config.pretrain
  inputs = ConfigDict(config.inputs.to_dict() | {"row_tokens": own.row_tokens})
  measured = pipeline.measure(
    captions, processor.prompt, processor.images, max_length=own.row_tokens
  )
  passes = -(-own.steps * own.rows * inputs.row_patches // int(measured.costs[:, 1].sum()))
  plan = measured.plan_rows(inputs, seed=_seed(config), epochs=passes)
  return pipeline.BatchIterator(measured, plan, rows_per_batch=own.rows, prefetch=inputs.prefetch)


def _make_step(
  graph: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, jax.Array]]:
  """Returns the jitted step (state, batch) -> (state, loss); `state` is donated."""

  def loss_of(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    rows = {key: array[0] for key, array in batch.items()}
    model: Any = merge(graph, params)
    logits_BTV = model.next_token_logits(rows)
    is_image_BT = rows["image_index"] >= 0
    return next_token_loss(logits_BTV, rows["tokens"], rows["segment_ids"], is_image_BT)

  def step(state, batch):
    loss, grads = jax.value_and_grad(loss_of)(state.params, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), loss

  return jax.jit(step, donate_argnums=0)
