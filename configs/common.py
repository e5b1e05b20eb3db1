"""Every key of a run, with its unit, its range and the paper's value as the default.

A recipe calls `get_config()` and changes only what differs. Any key can be overridden on the
command line: `--config.selection.fraction=0.05`. Recipes end in `in_form()`, so that
`--config=configs/RECIPE.py:toy` is the same recipe shrunk onto the embedded corpus.

Source of the defaults: arXiv 2602.04145, Qwen2.5-VL-7B rows.
"""

from ml_collections import ConfigDict

from bis_jax.models import backbones


def get_config() -> ConfigDict:
  """Returns the paper's recipe on the full released corpus, Qwen2.5-VL-7B."""
  c = ConfigDict()
  c.seed = 0  # data order, initialisation and random selection; an integer >= 0

  c.corpus = ConfigDict()
  c.corpus.name = "visualprm"  # "visualprm": files on disk; "toy": the embedded corpus, drawn
  c.corpus.annotations = "data/VisualPRM400K-v1.1-Raw/annotations.zip"  # folder of *.jsonl or zip
  c.corpus.images = "data/VisualPRM400K-v1.1-Raw/images.zip"  # folder or zip, never extracted
  c.corpus.cache = "~/.cache/bis_jax"  # folder of prepared and drawn corpora, shared by runs
  c.corpus.tau = 0.0  # a step is positive where its MC score > tau; in [0, 1)
  c.corpus.unmeasured = "negative"  # steps without continuations: "negative" (paper) or "ignore"
  c.corpus.max_rejected_fraction = 0.01  # of all records, in [0, 1]; above it the run stops
  c.corpus.workers = 0  # processes that read and check; 0: one a core
  c.corpus.toy = ConfigDict()  # what the embedded corpus is drawn from
  c.corpus.toy.rollouts = 48_000  # count, >= 1000
  c.corpus.toy.images = 16_000  # count, >= 300
  c.corpus.toy.seed = 0  # an integer >= 0
  c.corpus.toy.benchmark_items = 500  # count, >= 18
  c.corpus.toy.n_mc = 16  # continuations a step, >= 1
  c.corpus.toy.rollouts_a_group = 3  # count, >= 1
  # Factors, >= 0, on every source's rate of wrong notes, of looking again at what was noted, and
  # of continuations whose answer is lost; the last one on the wrong notes of continuations alone.
  c.corpus.toy.slip = 1.0
  c.corpus.toy.recovery = 1.0
  c.corpus.toy.lapse = 1.0
  c.corpus.toy.continuation_slip = 1.0
  c.corpus.toy.stop_at_zero = False  # steps after one with MC score 0 stay unmeasured

  c.selection = ConfigDict()
  c.selection.strategy = "full"  # a name of bis_jax.selection.strategies.STRATEGIES
  c.selection.fraction = 1.0  # of the rollouts of every source, in (0, 1]
  c.selection.per_source = True  # False: of all rollouts together, in one ranking
  c.selection.alpha = 0.2  # BIS smoothing, >= 0; paper: 0.05 at fraction >= 0.25, 0.2 at 0.10
  c.selection.none_positive = 1.0  # reliability of rollouts without a positive step, in [0, 1]

  c.labels = ConfigDict()
  # "hard": MC > tau; "soft": the MC score; "banded": see the bands; "truth": of the embedded corpus
  c.labels.kind = "hard"
  c.labels.band_low = 0.0  # banded: label 0 at or below; in [0, 1]
  c.labels.band_high = 0.5  # banded: label 1 above; in [band_low, 1]

  c.inputs = ConfigDict()
  c.inputs.tokenizer = ""  # folder or hub id; "": the model's checkpoint
  c.inputs.separator = "\n\n"  # text between steps; "" is the released evaluation's form
  c.inputs.max_length = 8192  # tokens of one rollout; longer ones lose whole trailing steps
  c.inputs.row_tokens = 8192  # tokens of one packed row, >= max_length
  c.inputs.row_patches = 24_576  # patch slots of one packed row; a multiple of 64, or 1024 a tile
  c.inputs.row_markers = 256  # step markers of one packed row
  c.inputs.row_multiple = 16  # rows per training step are rounded up to a multiple
  c.inputs.lookahead = 512  # waiting examples that a row may choose from, >= 1
  c.inputs.workers = 8  # processes that assemble rows; 0: threads of this process
  c.inputs.prefetch = 4  # global batches assembled ahead, >= 1

  c.model = ConfigDict()
  c.model.backbone = "qwen2_5_vl"  # a name of bis_jax.models.backbones.BACKBONES
  c.model.size = "7b"  # a size of the backbone's record
  c.model.checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"  # safetensors folder or hub id; "": random
  # The step marker's first embedding is the mean of all others, plus normal noise of this many of
  # their standard deviations, >= 0; a checkpoint that was trained with markers keeps its own.
  c.model.marker_noise = 0.0
  c.model.dtype = "bfloat16"  # of activations; parameters are float32
  # What the backward pass recomputes: "none"; "dots", all but products and attention; "offload", as
  # dots, with the products kept in the host's memory (TPU); "full", all but the inputs of layers.
  c.model.remat = "full"
  c.model.attention = "auto"  # by platform; or "splash" (TPU), "triton" (GPU), "xla" (any)
  # Learning-rate factor of every parameter: first matching regex wins, 0 freezes.
  # The vision tower is frozen; what projects its features is trained.
  towers = dict.fromkeys(backbone.tower for backbone in backbones.BACKBONES.values())
  c.model.learning_rates = (("|".join(towers), 0.0), (r".*", 1.0))

  # Keys that only one backbone reads: see `settings` in the record of models/BACKBONE/record.py.
  for backbone in backbones.BACKBONES.values():
    c[backbone.name] = ConfigDict({k: setting.default for k, setting in backbone.settings.items()})

  c.pretrain = ConfigDict()  # on captions of the embedded corpus, where model.checkpoint is ""
  c.pretrain.seed = 0  # random weights and the order of the captions; -1: the run's seed
  c.pretrain.steps = 0  # before the run, once for all corpora of the same pictures; 0: none
  c.pretrain.rows = 4  # packed rows a step, >= 1
  c.pretrain.row_tokens = 192  # tokens of a row, a caption with its pictures at least
  c.pretrain.learning_rate = 3e-3  # peak, > 0

  c.loss = ConfigDict()
  c.loss.normalise = "global"  # by the labelled markers of the "global" batch, or "micro" (release)

  c.optim = ConfigDict()
  c.optim.learning_rate = 1e-5  # peak, > 0
  c.optim.warmup = 0.05  # share of the steps, in [0, 1)
  c.optim.weight_decay = 0.05  # decoupled, on matrices only, >= 0
  c.optim.b1 = 0.9
  c.optim.b2 = 0.999
  c.optim.eps = 1e-8
  c.optim.clip = 1.0  # global gradient norm, > 0
  c.optim.moment_dtype = "float32"  # of the first moment: "float32" or "bfloat16"

  c.train = ConfigDict()
  c.train.global_batch = 512  # rollouts a step, on average (rows of a step are fixed)
  c.train.accumulate = 1  # micro-batches a step
  c.train.epochs = 1  # passes over the kept rollouts
  c.train.steps = 0  # stop after this many steps; 0: after the epochs
  c.train.log_every = 1  # steps
  c.train.checkpoint_every = 50  # steps
  c.train.keep_checkpoints = 2  # count, >= 1
  c.train.profile_steps = (0, 0)  # write a profiler trace of (first step, how many); (0, 0): none
  c.train.compile_cache = "compiled"  # compiled programs: a folder in corpus.cache; "": not kept

  c.mesh = ConfigDict()  # devices along each axis; one of them may be -1: all that are left
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.mesh.tensor = 1

  c.evaluation = ConfigDict()
  c.evaluation.benchmark = "data/VisualProcessBench"  # folder; "": do not evaluate
  c.evaluation.images = "multi"  # an item's images: all ("multi"), one "canvas", or the "first"
  c.evaluation.blank_images = False  # also score with blanked images: does the model look?
  c.evaluation.batch_rows = 16  # packed rows of a scoring batch, at most
  c.evaluation.every = 25  # steps between evaluations while training, >= 0; 0: only at the end
  c.evaluation.every_items = 500  # benchmark items scored each time, evenly spaced, >= 0; 0: all
  c.evaluation.dev_rollouts = 2000  # not kept, to tune a threshold on, >= 0; 0: no tuned_on_dev
  c.evaluation.page_items = 12  # benchmark items shown on index.html
  return c


def use_backbone(c: ConfigDict, name: str, size: str, checkpoint: str) -> ConfigDict:
  """Returns the recipe `c` for another backbone."""
  c.model.backbone, c.model.size, c.model.checkpoint = name, size, checkpoint
  c.inputs.row_patches = backbones.get(name).row_patches
  return c


def in_form(c: ConfigDict, form: str) -> ConfigDict:
  """Returns the recipe `c` in a form: "" as it stands, "toy" shrunk.

  The toy form takes the same path through the code on the embedded corpus, with a small model
  that is first pre-trained on captions, in minutes on two CPU cores.

  Raises:
    ValueError: there is no such form.
  """
  if form not in ("", "toy"):
    raise ValueError(
      f"a recipe has no form {form!r}: use configs/RECIPE.py or configs/RECIPE.py:toy"
    )
  return _shrink(c) if form == "toy" else c


def _shrink(c: ConfigDict) -> ConfigDict:
  c.corpus.name = "toy"
  c.inputs.max_length = 256
  c.inputs.row_tokens = 256
  c.inputs.row_markers = 32
  c.inputs.row_multiple = 8
  c.inputs.workers = 0
  backbone = backbones.get(c.model.backbone)
  c[backbone.name].update({key: setting.toy for key, setting in backbone.settings.items()})
  c.inputs.row_patches = backbone.toy_row_patches
  c.model.size = "toy"
  c.model.checkpoint = ""
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.model.learning_rates = ((r".*", 1.0),)
  c.pretrain.steps = 2000
  c.optim.learning_rate = 1e-3
  c.optim.b2 = 0.98
  c.train.global_batch = 16
  c.train.epochs = 3
  c.train.log_every = 10
  c.train.checkpoint_every = 200
  c.mesh.fsdp = 1
  c.mesh.data = -1
  c.evaluation.blank_images = True
  c.evaluation.batch_rows = 8
  c.evaluation.every = 200
  c.evaluation.every_items = 200
  c.evaluation.dev_rollouts = 500
  return c
