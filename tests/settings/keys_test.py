"""The table of keys: its ranges, its page, and keys that were renamed."""

import math
import pathlib

import pytest

from bis_jax.models.setting import Setting
from bis_jax.settings import config_check, keys
from configs import common

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "config.md"


@pytest.mark.parametrize(
  "allowed, inside, outside",
  [
    (">= 1", (1, 2), (0, 0.5)),
    ("> 0 and <= 1", (1e-9, 1), (0, 1.1, math.inf, math.nan)),
    (">= 0 and < 1", (0.9, 0), (-0.1, 1)),
    (">= 1 or = -1", (-1, 1, 8), (0, -2)),
    ("> 0 and multiple of 64", (64, 128), (0, 100)),
    (("a", "b"), ("a",), ("c", "")),
  ],
)
def test_allowed_values(allowed, inside, outside):
  setting = Setting(type(inside[0])(), allowed, "")
  assert all(map(setting.allows, inside)) and not any(map(setting.allows, outside))


def test_every_default_and_toy_value_is_allowed():
  for key, setting in keys.all_settings().items():
    assert setting.allows(setting.default) and setting.meaning, key
    assert setting.toy is None or setting.allows(setting.toy), key


def test_the_page_of_all_keys_is_current():
  assert PAGE.read_text() == keys.page(), "run python -m bis_jax.settings.keys > docs/config.md"


def test_a_config_nests_and_flattens():
  config = common.get_config()
  assert keys.flatten(config) == {k: s.default for k, s in keys.all_settings().items()}
  assert keys.nest(keys.flatten(config)) == config


@pytest.mark.parametrize("old, new", keys.RENAMED.items())
def test_an_old_name_is_answered_with_the_new_one(old, new, command):
  assert new in keys.all_settings() and old not in keys.all_settings()
  said = command("bis_jax.main", "--config=toy_bis10", "--workdir=x", f"--config.{old}=1").stderr
  assert f"--config.{old}=1: it is now config.{new}" in said


def test_unknown_and_missing_keys_are_named():
  config = common.get_config()
  config.optim.warmup, config.optim.warmpu = 0.1, 0.2
  del config.seed
  with pytest.raises(config_check.ConfigError) as error:
    config_check.check(config)
  assert "config.optim.warmup: it is now config.optim.warmup_fraction" in str(error.value)
  assert "config.optim.warmpu: unknown key; the nearest is config.optim.warmup_fraction" in str(
    error.value
  )
  assert "config.seed is missing" in str(error.value)
