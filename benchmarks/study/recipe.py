"""The recipe of every arm of the study: the toy form of the paper's, in one pass over its rollouts.

How it was set, by what `full` and `random` do and by nothing else:

- The backbone is pre-trained on captions as in every toy run. A seed gives the arm its own random
  weights and order of captions, so seeds differ in initialisation as well as in the order of the
  rollouts and in what `random` and `mixed` draw; arms of one seed start from the same backbone.
- The corpus is the embedded one, with wrong notes 1.33 times as frequent: then 89.2 % of the last
  steps score above 0.5, as in the released corpus. That is the one factor its statistics tell; what
  else it comes to, `python -m benchmarks.study.corpus_statistics slip=1.33` says. 24,000 rollouts,
  so that the whole study ends in hours.
- One pass for every arm. The peak learning rate and the rollouts a step are chosen once, on `full`
  and `random`: see `benchmarks.study`.
- The backbone is pre-trained for 6,000 steps. After 2,000 (loss 0.10 instead of 0.02) no arm of a
  tenth, by whatever strategy, got beyond what the text alone tells, which is no test of any.
"""

from configs import qwen_bis10


def get_config():
  """Returns the recipe; strategy, fraction and seed are the sweep's."""
  c = qwen_bis10.get_config("toy")
  c.corpus.toy.rollouts, c.corpus.toy.images = 24_000, 8_000
  c.corpus.toy.slip = 1.33
  c.corpus.workers = 1  # arms run abreast
  c.pretrain.seed, c.pretrain.steps = -1, 6000
  c.model.remat = "dots"  # faster than "none" on a CPU, which waits for its memory
  c.train.epochs = 1
  c.train.checkpoint_every = 500
  c.train.keep_checkpoints = 1
  c.evaluation.blank_images = False
  c.evaluation.dev_rollouts = 200
  c.evaluation.every = 300
  return c
