"""The measures that benchmarks report in their own papers, under their own names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# PRMBench's classes of errors (arXiv:2501.03124, table 1), under the names in its files.
_PRM_BENCH = {
  "simplicity": ("redundency", "circular"),
  "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
  "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
_NO_ERRORS = "multi_solutions"  # whose score is the F1 of the correct class alone
# {kind of benchmark: its own name of its main measure}
MAIN = {
  "VisualProcessBench": "overall micro-F1",
  "ProcessBench": "average F1",
  "PRMBench": "PRMScore",
}


def measures(kind: str, evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """Returns {threshold: {measure: value}} of a `benchmarks.Benchmark`'s evaluation.

  VisualProcessBench: macro-F1 by source, and their mean weighted by steps. ProcessBench: first-error
  F1 by subset, and their mean. PRMBench: PRMScore, half the F1 of the correct and half that of the
  erroneous class, over all steps, by class of error, and the means of its three groups of classes.
  """
  return {name: _at(kind, name, evaluation) for name in evaluation["thresholds"]}


def _at(kind: str, threshold: str, evaluation: Mapping[str, Any]) -> dict[str, float]:
  sources = {
    source: report["thresholds"][threshold] for source, report in evaluation["per_source"].items()
  }
  overall = evaluation["thresholds"][threshold]
  if kind == "ProcessBench":
    found = {f"{source} F1": block["first_error_f1"] for source, block in sources.items()}
    return {MAIN[kind]: float(np.mean([*found.values()]))} | found
  if kind == "PRMBench":
    found = {
      source: block["f1_correct" if source == _NO_ERRORS else "macro_f1"]
      for source, block in sources.items()
    }
    groups = {
      group: [found[name] for name in names if name in found] for group, names in _PRM_BENCH.items()
    }
    means = {group: float(np.mean(values)) for group, values in groups.items() if values}
    return {MAIN[kind]: overall["macro_f1_pooled"]} | means | found
  found = {f"{source} macro-F1": block["macro_f1"] for source, block in sources.items()}
  return {MAIN[kind]: overall["overall_source_weighted"]} | found
