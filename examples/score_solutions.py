"""Scores a solution: `python -m examples.score_solutions RUN_OR_FOLDER_OR_HUB_ID [IMAGE ...]`."""

import sys

import bis_jax

if __name__ == "__main__":
  model = bis_jax.load(sys.argv[1])
  steps = ["The red card shows 3.", "The blue card shows 4.", "Final answer: 7"]
  scores = model("Add the numbers on the cards.", sys.argv[2:], steps)
  for step, score in zip(steps, scores, strict=True):
    print(f"{score:.3f}  {step}")
