"""The recipe of every arm of the study: the toy form of the paper's, in one pass over its rollouts.

How it was set, before any two arms were compared:

- The backbone is pre-trained on captions as in every toy run. A seed gives the arm its own random
  weights and order of captions, so seeds differ in initialisation as well as in the order of the
  rollouts and in what `random` and `mixed` draw; arms of one seed start from the same backbone.
- The corpus is the embedded one with its own defaults; what they come to beside the released
  corpus's statistics, `python -m benchmarks.study.corpus_statistics` says. 32,000 rollouts, so that
  the whole study ends in hours.
- One pass and 8 rollouts a step, for every arm. The peak learning rate is chosen once, on `full`
  and `random` alone: see `benchmarks.study`.
"""

from configs import qwen_bis10


def get_config():
  """Returns the recipe; strategy, fraction and seed are the sweep's."""
  c = qwen_bis10.get_config("toy")
  c.corpus.toy.rollouts, c.corpus.toy.images = 32_000, 12_000
  c.corpus.workers = 1  # arms run abreast
  c.pretrain.seed = -1
  c.inputs.row_multiple = 4
  c.model.remat = "dots"  # faster than "none" on a CPU, which waits for its memory
  c.train.global_batch = 8
  c.train.epochs = 1
  c.train.checkpoint_every = 500
  c.train.keep_checkpoints = 1
  c.evaluation.blank_images = False
  c.evaluation.every = 100
  return c
