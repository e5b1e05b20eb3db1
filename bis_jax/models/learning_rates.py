"""Learning-rate rules (regex of parameters, factor): which parameters train, and how fast.

The first rule whose regex is found in a parameter's path decides it; factor 0 freezes, and "lora"
in place of one freezes and trains adapters instead (`adaptation`), at factor 1.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from bis_jax.errors import UserError
from bis_jax.models import backbones
from bis_jax.models.adaptation import is_adapter, is_added
from bis_jax.models.backbone import VISION_TOWER
from bis_jax.models.hub_layout import EMBEDDING_PATH, REWARD_HEAD_PATH
from bis_jax.models.model_config import LORA

_KEY = "config.model.learning_rates"


class RuleError(UserError):
  """Rules that do not fit the parameters."""


def factors(config: ConfigDict, paths: Collection[str]) -> dict[str, float]:
  """Returns the learning-rate factor of every parameter, adapters too; raises RuleError."""
  if found := malformed(config) or faults(config, paths):
    raise RuleError("\n  ".join(found))
  rules = zip(config.model.learning_rates, _decided(config, paths), strict=True)
  factor = {path: _factor(rule) for rule, decided in rules for path in decided}
  return {path: factor.get(path, float(is_adapter(path))) for path in paths}


def malformed(config: ConfigDict) -> list[str]:
  """Returns a sentence for what is not a rule in a config."""
  rules = config.model.learning_rates
  if not rules or not all(map(_is_rule, rules)):
    return [
      f"{_KEY} is {rules!r}; it must be pairs of a regex and a factor >= 0 or {LORA!r}, such as "
      f'(("{VISION_TOWER}", 0.0), (".*", 1.0))'
    ]
  try:
    for pattern, _ in rules:
      re.compile(pattern)
  except re.error as error:
    return [f"{_KEY} holds {error.pattern!r}, which is not a regex: {error}"]
  return []


def faults(config: ConfigDict, paths: Collection[str]) -> list[str]:
  """Returns a sentence for each rule of a config that does not fit the parameters."""
  rules, paths = config.model.learning_rates, [p for p in paths if not is_added(p)]
  decided, found = _decided(config, paths), []
  for (pattern, factor), taken in zip(rules, decided, strict=True):
    if taken:
      if factor == LORA and not any(p.endswith(".kernel") or p == EMBEDDING_PATH for p in taken):
        found.append(f"{_KEY}: {pattern!r} adapts no kernel: give it factor 0 instead of {LORA!r}")
    elif pattern != VISION_TOWER and any(re.search(pattern, path) for path in paths):
      found.append(f"{_KEY}: the rules before {pattern!r} decide all that it matches: put it first")
    else:
      nearest = ", ".join(difflib.get_close_matches(pattern, paths, cutoff=0))
      found.append(
        f"{_KEY}: {pattern!r} matches no parameter of {config.model.backbone}; the nearest are {nearest}"
      )
  if rest := sorted(set(paths).difference(*decided)):
    found.append(f'{_KEY}: no rule matches {rest[0]}: add (".*", 1.0) as the last one')
    return found
  if not any(rule[1] and taken for rule, taken in zip(rules, decided, strict=True)):
    found.append(f"{_KEY} freezes every parameter: give a rule a factor above 0")
  elif any(factor == LORA for _, factor in rules):
    factor = {path: rule[1] for rule, taken in zip(rules, decided, strict=True) for path in taken}
    if factor[REWARD_HEAD_PATH] in (0, LORA):
      found.append(f"{_KEY}: with {LORA!r}, {REWARD_HEAD_PATH} must have a factor above 0")
    if not factor[EMBEDDING_PATH]:
      found.append(
        f"{_KEY} freezes the step marker's embedding: give {EMBEDDING_PATH} {LORA!r}, which trains "
        "that row alone, or a factor above 0"
      )
  return found


def summary(config: ConfigDict, shapes: Mapping[str, Any]) -> str:
  """Returns how many parameters train and how many are frozen, by rule."""
  sizes = [
    sum(math.prod(shapes[path].shape) for path in decided) for decided in _decided(config, shapes)
  ]
  rules = list(zip(config.model.learning_rates, sizes, strict=True))
  parts = [
    f"{size:,} {f'by {rule[0]!r} at factor {rule[1]:g}' if _factor(rule) else f'frozen by {rule[0]!r}'}"
    for rule, size in rules
  ]
  trained = sum(size for rule, size in rules if _factor(rule))
  if adapters := sum(math.prod(s.shape) for path, s in shapes.items() if is_adapter(path)):
    parts.append(f"{adapters:,} in adapters and the step marker's row")
  return f"{trained + adapters:,} of {sum(sizes) + adapters:,} parameters train: {', '.join(parts)}"


def _factor(rule: tuple[str, float | str]) -> float:
  return 0.0 if rule[1] == LORA else float(rule[1])


def _is_rule(rule: Any) -> bool:
  return (
    isinstance(rule, tuple | list)
    and len(rule) == 2
    and isinstance(rule[0], str)
    and (rule[1] == LORA or type(rule[1]) in (int, float) and 0 <= rule[1] <= 1e6)
  )


def _decided(config: ConfigDict, paths: Collection[str]) -> list[list[str]]:
  """Returns the paths that each rule decides."""
  left, decided = [path for path in paths if not is_added(path)], []
  for pattern, _ in backbones.learning_rates(config):
    regex = re.compile(pattern)
    decided.append([path for path in left if regex.search(path)])
    left = [path for path in left if not regex.search(path)]
  return decided
