"""Compares closed forms of the gradient's signal with a simulation, and measures it on trained models.

  python -m benchmarks.study.theory --out=runs/theory [--workdir=RUN,RUN,...]

writes OUT/theory.json (every number), OUT/index.html and OUT/plots/*.png. Without runs it compares
`benchmarks.study.closed_forms` with its simulation, in seconds. With runs on the toy corpus it also
measures the reward head's gradient of rollouts that none of the runs trained on, under their MC labels,
and its component along the gradient under the true labels. The first run should be the initial student,
which is what a selection meets, and all runs should start from one backbone and train on random rollouts:

  for steps in 1 100 0; do python -m bis_jax.main --config=configs/qwen_random10.py:toy \\
    --workdir=runs/random10_$steps --config.train.steps=$steps; done   # 0: to the end
  # the first with --config.optim.learning_rate=1e-9: saved, but not trained

Results: docs/study.md.
"""

import json
import pathlib
import sys

from absl import app, flags

from benchmarks.study import theory_curves, theory_on_model, theory_page
from bis_jax.errors import UserError

_OUT = flags.DEFINE_string("out", "runs/theory", "folder to write")
_WORKDIR = flags.DEFINE_list("workdir", [], "runs on one toy corpus, the earliest student first")
_ROLLOUTS = flags.DEFINE_integer(
  "rollouts", 10_000, "number of rollouts to measure; half as many more give the direction"
)
_DRAWS = flags.DEFINE_integer("draws", 200, "number of bootstrap draws", lower_bound=20)


def main(argv: list[str]) -> None:
  """Writes theory.json, the plots and the page."""
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  results = {"simulation": theory_curves.compare(), "curves": theory_curves.curves()}
  if _WORKDIR.value:
    try:
      results["measured"] = theory_on_model.measure(_WORKDIR.value, _ROLLOUTS.value, _DRAWS.value)
    except (UserError, OSError) as error:
      sys.exit(f"theory: {error}")
  (out / "theory.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
  theory_page.write(out, results)
  print(theory_page.simulation_words(results["simulation"]))
  if "measured" in results:
    print(theory_page.measured_words(results["measured"]))
  print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
  app.run(main)
