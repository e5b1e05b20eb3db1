"""Full, random 10 % and BIS 10 % on the embedded corpus, three seeds each: a first comparison.

  python -m benchmarks.first_comparison --workdir=runs/first_comparison

Every arm is the toy recipe: three passes over the 10 % arms (945 steps), and one over the whole
corpus (3,150 steps). All start from the same pre-trained backbone; a seed sets the order of the data
and which rollouts `random` draws. Resumable: an arm that is done is not run again. The table at the
end is also written to WORKDIR/table.md.

Last result (x 100, mean and standard deviation of 3 seeds; an hour on one core):

| arm | overall_source_weighted, tuned_on_test | overall_source_weighted, fixed_0.5 | macro_f1_pooled, fixed_0.5 | roc_auc, fixed_0.5 |
|---|---|---|---|---|
| full | 93.41 ± 4.52 | 91.85 ± 5.46 | 91.78 ± 5.48 | 95.59 ± 2.69 |
| random 10 % | 77.11 ± 2.52 | 65.31 ± 6.16 | 65.56 ± 6.09 | 83.05 ± 2.63 |
| BIS 10 % | 98.46 ± 0.07 | 97.85 ± 0.33 | 97.75 ± 0.36 | 98.91 ± 0.04 |

Most rollouts of this corpus have no wrong step, so `random` and `full` seldom show the model one.
"""

import json
import pathlib
import statistics

from absl import app, flags

from bis_jax import run
from configs import qwen_bis10

_WORKDIR = flags.DEFINE_string("workdir", "runs/first_comparison", "one folder an arm goes here")
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs an arm", lower_bound=1)

ARMS = {"full": ("full", 1.0), "random 10 %": ("random", 0.1), "BIS 10 %": ("bis", 0.1)}
MEASURES = (
  ("tuned_on_test", "overall_source_weighted"),
  ("fixed_0.5", "overall_source_weighted"),
  ("fixed_0.5", "macro_f1_pooled"),
  ("fixed_0.5", "roc_auc"),
)


def _evaluate(strategy: str, fraction: float, seed: int) -> dict:
  folder = pathlib.Path(_WORKDIR.value) / f"{strategy}_{fraction:g}_seed{seed}"
  if (folder / "evaluation.json").exists():
    return json.loads((folder / "evaluation.json").read_text())
  config = qwen_bis10.get_config("toy")
  config.seed = seed
  config.selection.strategy, config.selection.fraction = strategy, fraction
  # Fewer passes over more data, but one at least.
  config.train.epochs = max(1, round(config.train.epochs * 0.1 / fraction))
  return run.run(config, str(folder))


def main(argv: list[str]) -> None:
  """Runs every arm and prints the table."""
  lines = [
    "| arm | " + " | ".join(f"{measure}, {threshold}" for threshold, measure in MEASURES) + " |",
    "|---" * (len(MEASURES) + 1) + "|",
  ]
  for arm, (strategy, fraction) in ARMS.items():
    results = [_evaluate(strategy, fraction, seed) for seed in range(_SEEDS.value)]
    cells = []
    for threshold, measure in MEASURES:
      values = [100 * result["thresholds"][threshold][measure] for result in results]
      spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
      cells.append(f"{statistics.mean(values):.2f}{spread}")
    lines.append(f"| {arm} | " + " | ".join(cells) + " |")
  table = "\n".join(lines) + "\n"
  (pathlib.Path(_WORKDIR.value) / "table.md").write_text(table)
  print(table)


if __name__ == "__main__":
  app.run(main)
