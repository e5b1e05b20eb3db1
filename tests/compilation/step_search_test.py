"""The search over settings, with a stub of the compiler."""

import dataclasses

import jax
import pytest

from bis_jax.compilation import step_search
from bis_jax.parallel.devices import CHIPS
from bis_jax.parallel.sharding import MeshError
from configs import qwen_bis10

HBM = CHIPS["v5e"].hbm_bytes


@dataclasses.dataclass
class Step:
  """The fields of a compiled step that the search reads."""

  total: float
  seconds: float
  rollouts: float = 512.0

  @property
  def free_memory(self):
    return 1 - self.total / HBM

  @property
  def bounds(self):
    return {"compute": self.seconds}


@pytest.fixture
def searched(monkeypatch):
  """(tried, compiled) of a search over 8 devices; saving more takes more memory and is faster."""
  monkeypatch.setattr(step_search, "slice_devices", lambda topology: list(range(8)))
  monkeypatch.setattr(step_search, "resident_bytes", lambda config, devices: 1e9 * config.mesh.data)
  compiled = []

  def compile_step(config, topology, rollout_tokens):
    settings = config.mesh.fsdp, config.mesh.tensor, config.train.accumulate, config.model.remat
    options = config.train.compiler_options
    compiled.append((*settings, options) if options else settings)
    if config.mesh.tensor == 4:
      raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: four\nand more")
    kept = step_search.REMATS.index(config.model.remat)
    if kept == 5:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.3G of 15.75G hbm. Exceeded")
    return Step(total=HBM * (0.4 + 0.15 * kept) / config.train.accumulate**0.5, seconds=6.0 - kept)

  config = qwen_bis10.get_config()
  config.inputs.row_multiple, config.train.global_batch = 8, 212  # 16 rows
  return list(step_search.search(config, "v5e:2x4", 618, compile_step)), compiled


def test_what_fits_comes_first_and_fastest(searched):
  tried, _ = searched
  table = list(step_search.table(tried))[2:]
  assert len(table) == len(tried)
  fits = [one.fits for one in sorted(tried, key=step_search.order)]
  assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
  assert "dots" in table[0] and "| 256 |" in table[0]


def test_a_candidate_that_fails_is_a_row(searched):
  tried, _ = searched
  rows = [step_search.row(one) for one in tried]
  assert any(row.endswith("| UNIMPLEMENTED: four |") for row in rows)
  assert any(row.endswith("| needs 20.3G of 15.75G |") for row in rows)
  assert any(row.endswith("| less than 10% free |") for row in rows)


@pytest.mark.parametrize(
  "message",
  [
    "Used 20.3G of 15.75G hbm. Exceeded",
    "the total memory required for HLO temporaries (20.3G) exceeds available HBM (15.75G).",
  ],
)
def test_both_messages_of_the_compiler_say_too_large(monkeypatch, message):
  """Mutation caught: the second one alone was taken for another failure, and all was compiled."""
  monkeypatch.setattr(step_search, "resident_bytes", lambda config, devices: 0)

  def fail(*_):
    raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

  trial = step_search._try(qwen_bis10.get_config(), "v5e:2x4", 618, [], fail)
  assert trial.too_large and trial.reason == "needs 20.3G of 15.75G"


def test_what_can_only_be_worse_is_not_compiled(searched):
  """Nothing larger than what did not fit, and nothing that keeps less than what fits."""
  tried, compiled = searched
  assert (8, 1, 2, "none") in compiled and (8, 1, 1, "none") not in compiled
  assert (8, 1, 1, "mlp") in compiled and (8, 1, 1, "attention") not in compiled
  assert sum("not compiled" in one.reason for one in tried) == len(tried) - len(compiled)


def test_compiler_options_are_tried_with_the_best_settings(searched):
  tried, compiled = searched
  assert compiled[-2:] == [(8, 1, 2, "dots", options) for options in step_search.OPTIONS]
  assert step_search.row(tried[-1]).endswith(f"| with {step_search.OPTIONS[-1]} |")


def test_rows_that_divide_over_no_mesh_are_an_error(monkeypatch):
  monkeypatch.setattr(step_search, "slice_devices", lambda topology: list(range(64)))
  config = qwen_bis10.get_config()
  config.inputs.row_multiple = 1
  config.train.global_batch = 14  # one row
  with pytest.raises(MeshError, match="1 rows per step do not divide over any mesh of 64 devices"):
    list(step_search.search(config, "v5e:8x8", 618))
