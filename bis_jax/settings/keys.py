"""Every key of a run's config: default, toy value, allowed values, unit and meaning.

The defaults are the paper's for Qwen2.5-VL-7B (arXiv 2602.04145). Recipes in configs/ change what
differs; the command line can set any key: `--config.selection.fraction=0.05`. Keys that only one
backbone reads are in its record, models/BACKBONE/record.py. `python -m bis_jax.settings.keys` prints
all of them as docs/config.md.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bis_jax.corpus.formats import NAMES
from bis_jax.models.backbone import VISION_TOWER
from bis_jax.models.backbones import BACKBONES
from bis_jax.models.layers import REMATS
from bis_jax.models.model_config import LORA
from bis_jax.models.quantization import DTYPES
from bis_jax.models.setting import NOT_EMPTY, OWN, Setting
from bis_jax.selection.strategies import STRATEGIES

_CORPUS = "data/VisualPRM400K-v1.1-Raw"
_SEED = ">= 0 and < 2147483648"
# Prepared corpora have no embeddings for semdedup.
_STRATEGIES = (*(name for name in STRATEGIES if name != "semdedup"), OWN)
_PROCESSES = ">= 0 and <= 1024"

SETTINGS: dict[str, Setting] = {
  "seed": Setting(0, _SEED, "of data order, initialization and random selection"),
  # Corpus
  "corpus.name": Setting("visualprm", ("visualprm", "toy"), "files on disk, or drawn", toy="toy"),
  "corpus.annotations": Setting(
    f"{_CORPUS}/annotations.zip",
    NOT_EMPTY,
    "folder, zip or file, local or gs://, as all paths, or a dataset id of the hub",
  ),
  "corpus.format": Setting("auto", NAMES, "of the records; auto: recognized by their keys"),
  "corpus.agreement": Setting(
    "",
    None,
    'key of a second MC score: steps of which one alone is positive are unmeasured; "": none',
  ),
  "corpus.images": Setting(
    f"{_CORPUS}/images.zip", None, 'folder or zip, never extracted; "": none, text alone'
  ),
  "corpus.cache": Setting(
    "~/.cache/bis_jax", NOT_EMPTY, "folder of prepared corpora, shared by runs"
  ),
  "corpus.tau": Setting(0.0, ">= 0 and < 1", "a step is positive if its MC score > tau"),
  "corpus.unmeasured": Setting(
    "negative", ("negative", "ignore"), "steps without continuations; the paper's are negative"
  ),
  "corpus.max_rejected_fraction": Setting(
    0.01, ">= 0 and <= 1", "of all records; more stop the run"
  ),
  "corpus.workers": Setting(0, _PROCESSES, "processes that read and check; 0: one per core"),
  # What the toy corpus is drawn from. Factors multiply the rates of every source.
  "corpus.toy.rollouts": Setting(48_000, ">= 1000 and <= 10000000", "number of rollouts"),
  "corpus.toy.images": Setting(16_000, ">= 300 and <= 10000000", "number of images"),
  "corpus.toy.seed": Setting(0, _SEED, "of the drawing"),
  "corpus.toy.benchmark_items": Setting(500, ">= 18 and <= 100000", "number of benchmark items"),
  "corpus.toy.n_mc": Setting(16, ">= 1 and <= 1024", "continuations per step"),
  "corpus.toy.rollouts_per_group": Setting(3, ">= 1 and <= 1024", "rollouts per question"),
  "corpus.toy.slip": Setting(1.0, ">= 0 and <= 100", "factor: wrong notes"),
  "corpus.toy.recovery": Setting(1.0, ">= 0 and <= 100", "factor: looking again at what was noted"),
  "corpus.toy.lapse": Setting(1.0, ">= 0 and <= 100", "factor: continuations whose answer is lost"),
  "corpus.toy.continuation_slip": Setting(
    1.0, ">= 0 and <= 100", "factor: wrong notes of continuations"
  ),
  "corpus.toy.stop_at_zero": Setting(False, None, "no continuations after a step with MC score 0"),
  "corpus.toy.described": Setting(False, None, "by the question, without pictures: text alone"),
  "corpus.toy.kinds": Setting(0, ">= 0 and <= 600", "of tile, a multiple of 6; 0: with stripes"),
  "corpus.toy.first_kind": Setting(0, ">= 0 and <= 600", "the first of them, a multiple of 6"),
  "corpus.toy.kind_exponent": Setting(
    0.0, ">= 0 and <= 10", "of the power law of their frequencies"
  ),
  # Selection
  "selection.strategy": Setting("full", _STRATEGIES, "how rollouts are ranked"),
  "selection.fraction": Setting(1.0, ">= 0.0001 and <= 1", "of the rollouts of each source"),
  "selection.per_source": Setting(True, None, "False: one ranking of all sources together"),
  "selection.alpha": Setting(
    0.2, ">= 0 and <= 100", "BIS smoothing; paper: 0.05 if fraction >= 0.25, 0.2 at 0.10"
  ),
  "selection.reliability_if_no_positive": Setting(
    1.0, ">= 0 and <= 1", "R of rollouts without a positive step"
  ),
  # Labels. hard: MC > tau; soft: the MC score; banded: see the bands; beta: a Beta belief in the MC
  # score, by the counts; truth: known for toy only
  "labels.kind": Setting("hard", ("hard", "soft", "banded", "beta", "truth"), "target of a step"),
  "labels.band_low": Setting(0.0, ">= 0 and <= 1", "banded: label 0 at or below this MC score"),
  "labels.band_high": Setting(0.5, ">= 0 and <= 1", "banded: label 1 above; >= band_low"),
  "labels.neutral": Setting(
    "by_score",
    ("by_score", "positive", "negative", "ignore"),
    "ratings of 0.5 without counts, PRM800K's; by_score: as any other MC score",
  ),
  "labels.min_continuations": Setting(
    0, ">= 0 and <= 65535", "no label for steps of which fewer are known"
  ),
  "labels.until_first_wrong": Setting(False, None, "no label after the first wrong step"),
  # Inputs
  "inputs.tokenizer": Setting("", None, 'folder or hub id; "": that of the checkpoint'),
  "inputs.separator": Setting("\n\n", None, 'between steps; the released evaluation has ""'),
  "inputs.max_length": Setting(
    8192, ">= 16 and <= 1048576", "tokens per rollout; longer ones lose trailing steps", toy=256
  ),
  "inputs.row_tokens": Setting(
    8192, ">= 16 and <= 1048576", "tokens per packed row; >= max_length", toy=256
  ),
  "inputs.row_patches": Setting(
    BACKBONES["qwen2_5_vl"].row_patches,
    "> 0 and <= 4194304 and multiple of 64",
    "patch slots per packed row",
  ),
  "inputs.row_markers": Setting(256, ">= 1 and <= 65536", "step markers per packed row", toy=32),
  "inputs.row_streams": Setting(
    -1,
    ">= -1 and <= 64",
    "streams of solutions that share a prefix, per row; 0: none; -1: proposed if they pay",
    toy=0,
  ),
  "inputs.stream_tokens": Setting(
    0, ">= 0 and <= 1048576", "tokens per stream, of row_tokens; 0: proposed"
  ),
  "inputs.row_multiple": Setting(
    16, ">= 1 and <= 65536", "rows per step are rounded to a multiple", toy=8
  ),
  "inputs.lookahead": Setting(
    512, ">= 1 and <= 1000000", "waiting examples that a row may choose from"
  ),
  "inputs.workers": Setting(8, _PROCESSES, "processes that assemble rows; 0: threads", toy=0),
  "inputs.prefetch": Setting(4, ">= 1 and <= 1024", "global batches assembled ahead"),
  # Model
  "model.backbone": Setting("qwen2_5_vl", tuple(BACKBONES), "folder in bis_jax/models"),
  "model.size": Setting("7b", None, "a size in the backbone's record", toy="toy"),
  "model.checkpoint": Setting(
    "Qwen/Qwen2.5-VL-7B-Instruct", None, 'safetensors folder or hub id; "": random', toy=""
  ),
  # The step marker's initial embedding is the mean of all others plus normal noise; a checkpoint
  # that was trained with markers keeps its own.
  "model.marker_noise": Setting(
    0.0, ">= 0 and <= 100", "noise, in standard deviations of the embeddings"
  ),
  "model.dtype": Setting(
    "bfloat16", ("float32", "bfloat16"), "of activations; parameters are float32", toy="float32"
  ),
  # dots: all but products and attention; mlp, attention: all but the products of the one and
  # attention; offload: as dots, with products kept in host memory (TPU); full: all but the inputs of
  # layers; auto: dots on TPU, else full
  "model.remat": Setting(
    "auto", ("auto", *REMATS), "what the backward pass recomputes", toy="none"
  ),
  "model.attention": Setting(
    "auto",
    ("auto", "splash", "tokamax", "xla", "xla_short"),
    "splash: TPU; tokamax: GPU, bfloat16, Hopper or later; xla_short: small models on a CPU; auto: by "
    "platform",
  ),
  # The vision tower is frozen; the projector is trained.
  "model.learning_rates": Setting(
    ((VISION_TOWER, 0.0), (r".*", 1.0)),
    None,
    f"(regex of parameters or {VISION_TOWER!r}, factor); the first match wins, 0 freezes, {LORA!r} "
    "freezes and trains adapters and the step marker's row instead",
    toy=((r".*", 1.0),),
  ),
  "model.frozen_dtype": Setting(
    "float32",
    ("float32", "bfloat16", *DTYPES),
    "of frozen parameters; int8, nf4: of kernels, with a scale for 64 values; the others are bfloat16",
  ),
  "model.trained_dtype": Setting(
    "float32",
    ("float32", "bfloat16"),
    "of trained parameters but adapters; bfloat16: rounded at random after every step",
  ),
  # Adapters (LoRA), of kernels that a rule of model.learning_rates gives "lora"
  "lora.rank": Setting(16, ">= 1 and <= 65536", "inner width of an adapter"),
  "lora.alpha": Setting(32.0, "> 0 and <= 1000000", "an adapter's output is times alpha / rank"),
  "lora.dropout": Setting(0.0, ">= 0 and < 1", "of an adapter's input, in training"),
  # Pre-training on captions, for the toy corpus without a checkpoint
  "pretrain.seed": Setting(
    0, ">= -1 and < 2147483648", "of parameters and order; -1: the run's seed"
  ),
  "pretrain.steps": Setting(0, ">= 0", "0: none; shared by all runs on the same images", toy=2000),
  "pretrain.rows": Setting(4, ">= 1 and <= 65536", "packed rows per step"),
  "pretrain.row_tokens": Setting(
    192, ">= 16 and <= 1048576", "tokens per row; at least a caption with its images"
  ),
  "pretrain.learning_rate": Setting(3e-3, "> 0 and <= 1", "peak"),
  # Loss and optimizer
  "loss.normalise": Setting(
    "global",
    ("global", "micro"),
    "mean over the batch's markers; micro: of the means of 2 rollouts each (release)",
  ),
  "optim.learning_rate": Setting(1e-5, "> 0 and <= 1", "peak", toy=1e-3),
  "optim.warmup_fraction": Setting(0.05, ">= 0 and < 1", "of the steps"),
  "optim.weight_decay": Setting(0.05, ">= 0 and <= 1", "decoupled, on matrices only"),
  "optim.b1": Setting(0.9, ">= 0 and < 1", "decay of the first moment"),
  "optim.b2": Setting(0.999, ">= 0 and < 1", "decay of the second moment", toy=0.98),
  "optim.eps": Setting(1e-8, "> 0 and <= 1", "of Adam"),
  "optim.clip": Setting(1.0, ">= 1e-06 and <= 1e+09", "global gradient norm"),
  "optim.moment_dtype": Setting("float32", ("float32", "bfloat16"), "of the first moment"),
  "optim.second_moment_dtype": Setting(
    "float32", ("float32", "bfloat16"), "bfloat16: rounded at random after every step"
  ),
  "optim.on_host": Setting(False, None, "moments in the host's memory between steps"),
  # Training
  "train.global_batch": Setting(
    512, ">= 1 and <= 1000000", "rollouts per step, on average", toy=16
  ),
  "train.accumulate": Setting(
    0, ">= 0 and <= 65536", "micro-batches per step; 0: as few as fit the chip; 1 unless TPU", toy=1
  ),
  "train.compiler_options": Setting(
    "", None, "of XLA, NAME=VALUE separated by spaces, in place of those of the chip"
  ),
  "train.epochs": Setting(1, ">= 1 and <= 10000", "passes over the selected rollouts", toy=3),
  "train.steps": Setting(0, ">= 0", "stop after this many steps; 0: after the epochs"),
  "train.log_every": Setting(1, ">= 1", "steps", toy=10),
  "train.checkpoint_every": Setting(50, ">= 1", "steps", toy=200),
  "train.keep_checkpoints": Setting(2, ">= 1", "number of latest checkpoints"),
  "train.profile_steps": Setting(
    (0, 0), ">= 0", "(first step, number) of a profiler trace; (0, 0): none"
  ),
  "train.tracker": Setting(
    "none", ("none", "wandb", "trackio"), "library that gets the metrics too; it must be installed"
  ),
  "train.compile_cache": Setting("compiled", None, 'folder in corpus.cache; "": no cache'),
  # Devices along each axis; at most one -1: the remaining devices
  "mesh.data": Setting(1, ">= 1 or = -1", "copies of the parameters", toy=-1),
  "mesh.fsdp": Setting(-1, ">= 1 or = -1", "devices that share parameters and batch", toy=1),
  "mesh.tensor": Setting(
    0, ">= 0 or = -1", "devices that share heads and hidden units; 0: as the chip needs", toy=1
  ),
  # Evaluation
  "evaluation.benchmark": Setting("data/VisualProcessBench", None, 'folder; "": no evaluation'),
  "evaluation.images": Setting(
    "multi", ("multi", "canvas", "first"), "of an item: all, all on one canvas, or the first"
  ),
  "evaluation.blank_images": Setting(False, None, "score grey images too", toy=True),
  "evaluation.batch_rows": Setting(
    16, ">= 1 and <= 65536", "maximum packed rows per scoring batch", toy=8
  ),
  "evaluation.every": Setting(25, ">= 0", "steps; 0: at the end only", toy=200),
  "evaluation.every_items": Setting(500, ">= 0", "evenly spaced items each time; 0: all", toy=200),
  "evaluation.dev_rollouts": Setting(
    2000, ">= 0", "held-out rollouts to tune a threshold; 0: no tuned_on_dev", toy=500
  ),
  "evaluation.page_items": Setting(12, ">= 0", "benchmark items on index.html"),
}

# Old name -> new name.
RENAMED = {
  "inputs.min_pixels": "qwen2_5_vl.min_pixels",
  "inputs.max_pixels": "qwen2_5_vl.max_pixels",
  "inputs.max_tiles": "internvl.max_tiles",
  "inputs.system": "internvl.system",
  "model.drop_path": "internvl.drop_path",
  "corpus.toy.rollouts_a_group": "corpus.toy.rollouts_per_group",
  "selection.none_positive": "selection.reliability_if_no_positive",
  "optim.warmup": "optim.warmup_fraction",
}


def all_settings() -> dict[str, Setting]:
  """Returns SETTINGS and those of every backbone, by key."""
  own = {
    f"{name}.{key}": setting
    for name, backbone in BACKBONES.items()
    for key, setting in backbone.settings.items()
  }
  return SETTINGS | own


def flatten(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
  """Returns {"a": {"b": 1}} as {"a.b": 1}."""
  flat = {}
  for key, value in tree.items():
    nested = isinstance(value, Mapping | ConfigDict)
    flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
  return flat


def nest(flat: Mapping[str, Any]) -> ConfigDict:
  """Returns the config of {"a.b": 1}."""
  config: dict[str, Any] = {}
  for key, value in flat.items():
    *sections, name = key.split(".")
    section = config
    for part in sections:
      section = section.setdefault(part, {})
    section[name] = value
  return ConfigDict(config)


def page() -> str:
  """Returns the Markdown page of all keys."""
  lines = [
    "# Every key of a run's config",
    "",
    "Generated by `python -m bis_jax.settings.keys`.",
    "",
  ]
  lines += ["| key | default | toy | allowed | meaning |", "|---|---|---|---|---|"]
  for key, s in all_settings().items():
    toy = "" if s.toy is None else f"`{s.toy!r}`"
    cells = (f"`{key}`", f"`{s.default!r}`", toy, s.words(), s.meaning)
    lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(page(), end="")
