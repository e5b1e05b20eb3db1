"""The recipe of every arm of the study: the toy form of the paper's. docs/study.md has its history."""

from configs import qwen_bis10


def get_config():
  """Returns the recipe; the sweep sets strategy, fraction and seed."""
  c = qwen_bis10.get_config("toy")
  c.corpus.toy.rollouts, c.corpus.toy.images = 24_000, 8_000
  c.corpus.toy.slip = 1.33
  c.corpus.workers = 1  # several arms run at the same time
  c.pretrain.seed, c.pretrain.steps = -1, 6000
  c.model.remat = "dots"  # faster than "none" on a CPU, which is limited by its memory
  c.train.epochs = 1
  c.train.checkpoint_every = 500
  c.train.keep_checkpoints = 1
  c.evaluation.blank_images = False
  c.evaluation.dev_rollouts = 200
  c.evaluation.every = 300
  return c
