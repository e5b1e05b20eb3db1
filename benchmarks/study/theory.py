"""Why BIS should work: closed forms against simulation, and the same signal on a real model.

  python -m benchmarks.study.theory --out=runs/theory [--workdir=RUN,RUN,...]

writes OUT/theory.json (every number), OUT/index.html and OUT/plots/*.png. Alone it compares
`benchmarks.study.closed_forms` with its simulation, in seconds. With runs on the embedded corpus it measures, for
rollouts that none of them trained on, the reward head's gradient of each under its MC labels, and
how it lies to the gradient under the true labels. The first run should be what a selection meets
before training, and all should start from one backbone and see rollouts that BIS did not choose:

  for steps in 1 100 0; do python -m bis_jax.main --config=configs/qwen_random10.py:toy \\
    --workdir=runs/random10_$steps --config.train.steps=$steps; done   # 0: to the end
  # the first with --config.optim.learning_rate=1e-9: a student that is saved but has not moved

Last result (the study's runs of seed 0 on random tenths; 2.6 minutes of processor time):

  closed forms against simulation, 50 settings x 3   none beyond 3 standard errors, largest 2.28
  signal-to-noise of one rollout along the teacher:

  | student | all | mixed | all positive | none positive | top tenth by BIS | by p(1-p) | by R |
  |---|---|---|---|---|---|---|---|
  | before the first step | 0.14 | 0.05 | 0.15 | 0.09 | 0.15 | 0.04 | 0.52 |
  | the prior alone, same states | 0.11 | 0.42 | 0.15 | -0.46 | 0.17 | 0.41 | -0.15 |
  | one pass, step 630 | 0.15 | 1.55 | -0.81 | -0.53 | 0.81 | 1.37 | -0.13 |
  | five passes, step 3,150 | 0.08 | 1.10 | -0.38 | -0.51 | 0.56 | 1.00 | -0.15 |

Once the prior is known, mixed rollouts (9 %) carry the signal, as the theory says. Reliability does
not show here: labels of this corpus are wrong at MC scores of 3/16 and less, hardly anywhere else,
and ranking by R, with 1 for rollouts without a positive step, brings in those (16 % of the tenth by
BIS, 2 % of all).
"""

import json
import pathlib
import sys

from absl import app, flags

from benchmarks.study import theory_curves, theory_on_model, theory_page
from bis_jax.settings.workdir import WorkdirError

_OUT = flags.DEFINE_string("out", "runs/theory", "folder to write into")
_WORKDIR = flags.DEFINE_list(
  "workdir", [], "runs on one embedded corpus, the earliest student first"
)
_ROLLOUTS = flags.DEFINE_integer(
  "rollouts", 10_000, "measured; half as many more give the direction"
)
_DRAWS = flags.DEFINE_integer("draws", 200, "of the bootstrap", lower_bound=20)


def main(argv: list[str]) -> None:
  """Writes theory.json, the plots and the page."""
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  results = {"simulation": theory_curves.compare(), "curves": theory_curves.curves()}
  if _WORKDIR.value:
    try:
      results["measured"] = theory_on_model.measure(_WORKDIR.value, _ROLLOUTS.value, _DRAWS.value)
    except (WorkdirError, OSError) as error:
      sys.exit(f"theory: {error}")
  (out / "theory.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
  theory_page.write(out, results)
  print(theory_page.simulation_words(results["simulation"]))
  if "measured" in results:
    print(theory_page.measured_words(results["measured"]))
  print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
  app.run(main)
