"""Learning-rate rules (regex of parameters, factor): which parameters train, and how fast.

The first rule whose regex is found in a parameter's path decides it; factor 0 freezes.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.models import backbones

VISION_TOWER = "vision tower"  # in place of a regex: the one in the backbone's record


class RuleError(UserError):
  """Rules that do not fit the parameters."""


def factors(config: ConfigDict, paths: Collection[str]) -> dict[str, float]:
  """Returns the learning-rate factor of every parameter; raises RuleError."""
  if found := faults(config, paths):
    raise RuleError("\n  ".join(found))
  rules = zip(config.model.learning_rates, _decided(config, paths), strict=True)
  factor = {path: float(rule[1]) for rule, decided in rules for path in decided}
  return {path: factor[path] for path in paths}


def faults(config: ConfigDict, paths: Collection[str]) -> list[str]:
  """Returns a sentence for each fault of a config's rules."""
  key, rules = "config.model.learning_rates", config.model.learning_rates
  if not rules or not all(map(_is_rule, rules)):
    return [
      f"{key} is {rules!r}; it must be pairs of a regex and a factor >= 0, such as "
      f'(("{VISION_TOWER}", 0.0), (".*", 1.0))'
    ]
  try:
    decided = _decided(config, paths)
  except re.error as error:
    return [f"{key} holds {error.pattern!r}, which is not a regex: {error}"]
  found = []
  for (pattern, _), taken in zip(rules, decided, strict=True):
    if taken:
      continue
    if pattern != VISION_TOWER and any(re.search(pattern, path) for path in paths):
      found.append(f"{key}: the rules before {pattern!r} decide all that it matches: put it first")
    else:
      nearest = ", ".join(difflib.get_close_matches(pattern, paths, cutoff=0))
      found.append(
        f"{key}: {pattern!r} matches no parameter of {config.model.backbone}; the nearest are {nearest}"
      )
  if rest := sorted(set(paths).difference(*decided)):
    found.append(f'{key}: no rule matches {rest[0]}: add (".*", 1.0) as the last one')
  elif not any(rule[1] and taken for rule, taken in zip(rules, decided, strict=True)):
    found.append(f"{key} freezes every parameter: give a rule a factor above 0")
  return found


def summary(config: ConfigDict, shapes: Mapping[str, Any]) -> str:
  """Returns how many parameters train and how many are frozen, by rule."""
  sizes = [
    sum(math.prod(shapes[path].shape) for path in decided) for decided in _decided(config, shapes)
  ]
  rules = list(zip(config.model.learning_rates, sizes, strict=True))
  parts = [
    f"{size:,} {f'by {pattern!r} at factor {factor:g}' if factor else f'frozen by {pattern!r}'}"
    for (pattern, factor), size in rules
  ]
  trained = sum(size for (_, factor), size in rules if factor)
  return f"{trained:,} of {sum(sizes):,} parameters train: {', '.join(parts)}"


def _is_rule(rule: Any) -> bool:
  return (
    isinstance(rule, tuple | list)
    and len(rule) == 2
    and isinstance(rule[0], str)
    and type(rule[1]) in (int, float)
    and 0 <= rule[1] <= 1e6
  )


def _decided(config: ConfigDict, paths: Collection[str]) -> list[list[str]]:
  """Returns the paths that each rule decides."""
  left, decided = list(paths), []
  for pattern, _ in config.model.learning_rates:
    tower = backbones.get(config.model.backbone).tower
    regex = re.compile(tower if pattern == VISION_TOWER else pattern)
    decided.append([path for path in left if regex.search(path)])
    left = [path for path in left if not regex.search(path)]
  return decided
