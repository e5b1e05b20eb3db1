"""The recipes of the study: of every arm, and of the two runs that make the model all arms start from.

docs/study.md tells how they were set.
"""

from configs import qwen_bis10

KINDS = 36  # of tile in the corpora; the backbone learns to check on as many others
KNOWN = range(KINDS, 2 * KINDS)  # to the backbone


def get_config(form: str = ""):
  """Returns the recipe of an arm, or of the backbone's run `learn` or `settle`.

  The sweep sets checkpoint, strategy, fraction and seed.
  """
  c = qwen_bis10.get_config("toy")
  c.corpus.toy.kinds = KINDS
  c.corpus.workers = 1  # several arms run at the same time
  # Faster on a CPU, which is limited by its memory.
  c.model.remat, c.model.attention = "dots", "xla_short"
  c.train.epochs = 1
  c.train.keep_checkpoints = 1
  c.train.checkpoint_every = 4000
  c.evaluation.dev_rollouts = 200
  c.evaluation.every = 200
  if form:  # to see, read and check: captions and many wrong notes
    c.selection.strategy, c.selection.fraction = "full", 1.0
    c.corpus.toy.first_kind = KNOWN.start
    c.pretrain.steps, c.corpus.toy.slip = 3000, 5.0
  if form == "learn":
    return c
  c.pretrain.steps = 0
  # As in the released corpus: wrong notes, pseudo-positives and the number of steps.
  c.corpus.toy.slip, c.corpus.toy.recovery = 1.33, 30.0
  c.corpus.toy.benchmark_items = 1000
  if form == "settle":
    c.corpus.toy.rollouts, c.corpus.toy.images = 24_000, 8_000
    c.labels.kind = "truth"
    c.optim.learning_rate = 2e-4
    c.train.global_batch, c.inputs.row_multiple = 4, 2
    return c
  c.optim.learning_rate = 4e-4
  c.train.global_batch, c.inputs.row_multiple = 8, 4
  c.corpus.toy.seed = 1  # other pictures
  c.corpus.toy.first_kind = KINDS + KINDS // 3  # of these the last third is new
  c.corpus.toy.kind_exponent = 0.5
  return c
