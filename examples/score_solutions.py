"""Scores a solution with a trained run: `python -m examples.score_solutions RUN [IMAGE]`."""

import pathlib
import sys

from bis_jax.scoring import solutions, step_scorer

if __name__ == "__main__":
  scorer = step_scorer.load(sys.argv[1])
  images = [pathlib.Path(path).read_bytes() for path in sys.argv[2:]]
  steps = ["The red card shows 3.", "The blue card shows 4.", "Final answer: 7"]
  solution = solutions.Solution.of("Add the numbers on the cards.", steps, images)
  (scores,) = solutions.score(scorer, [solution])
  if isinstance(scores, solutions.SolutionError):  # it is too long for the run's limits
    raise scores
  for step, score in zip(steps, scores, strict=True):
    print(f"{score:.3f}  {step}")
