"""The recipe of every arm of the study: the toy form of the paper's.

How it was set:

- The backbone is pre-trained on captions as in every toy run. A seed gives the arm its own random
  weights and order of captions, so seeds differ in initialisation as well as in the order of the
  rollouts and in what `random` and `mixed` draw; arms of one seed start from the same backbone.
- The corpus is the embedded one, with wrong notes 1.33 times as frequent: then 89.2 % of the last
  steps score above 0.5, as in the released corpus. That is the one factor its statistics tell; what
  else it comes to, `python -m benchmarks.study.corpus_statistics slip=1.33` says. 24,000 rollouts,
  so that the whole study ends in hours.
- The peak learning rate and the rollouts a step are chosen once, by what `full` and `random` do:
  see `benchmarks.study`. One pass, as in the paper; arms of five passes were added when the arms of
  one had run, because one pass of a tenth is too few steps for this backbone.
- The larger corpus was added when all these had run and seeds of an arm were found to differ by tens
  of points. There all seeds have one backbone, as in the paper; what is left, the order and the choice
  of rollouts, still makes ten points. Its 48,000 rollouts, 16 a step, rate 1e-3 and three passes are
  the toy recipes' own, not chosen by `full` and `random`, and nothing else was tried. It was known that
  BIS is ahead under such a recipe: 98.5 against 77.1, and 93.4 of all, in a comparison of three seeds
  with fewer wrong notes that came before this study. So it shows where the claim holds, and is no
  blind test of it.
- The backbone is pre-trained for 6,000 steps, set by tries with 40,000 rollouts, one seed and a tenth
  of them by BIS and by random. After 2,000 steps (loss 0.10) neither got beyond what the text alone
  tells, which is a test of no strategy: 58.3 and 55.6. After 6,000 (loss 0.02), 68.8 and 56.7.
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
