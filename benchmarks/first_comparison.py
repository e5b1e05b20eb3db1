"""Full, random 10 % and BIS 10 % on the embedded corpus, three seeds each: a first comparison.

  python -m benchmarks.first_comparison --workdir=runs/first_comparison

Every arm is the toy recipe and sees as many rollouts as the 10 % arms do, so arms differ in their
data alone. Resumable: an arm that is done is not run again. The table at the end is also written to
WORKDIR/table.md.

Last result: none yet; the toy model does not learn to see (README), so there is nothing to compare.
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
  # The same number of rollouts seen by every arm: a full pass is ten passes over a tenth.
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
