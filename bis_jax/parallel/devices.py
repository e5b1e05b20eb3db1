"""Peak rates of chips, and TPU slices without hardware.

The real TPU compiler builds programs for the devices of `slice_devices` on any machine with libtpu.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from bis_jax.errors import UserError


class TopologyError(UserError):
  """An unknown slice; the message lists the known ones."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip; memory and rates are of one JAX device."""

  device_kind: str  # JAX's name of its devices
  version: str  # JAX's name of the chip
  hbm_bytes: float  # rounded down where the source says GB
  link_bandwidth: float  # bytes per second to all neighbours together, one way
  cores: int = 1  # TensorCores that work as one device
  devices: int = 1  # per chip

  @property
  def flops(self) -> float:
    """Peak bfloat16 FLOP/s."""
    return self._core.bf16_ops_per_second * self.cores

  @property
  def hbm_bandwidth(self) -> float:
    """Bytes per second."""
    return self._core.mem_bw_bytes_per_second * self.cores

  @property
  def _core(self) -> pltpu.TpuInfo:
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(self.version), self.cores)


# Source of memory and links: Google Cloud TPU documentation, "System architecture" of each version
# (cloud.google.com/tpu/docs/v4 and so on). Link bandwidth is half of the bidirectional figure.
CHIPS: dict[str, Chip] = {
  "v4": Chip("TPU v4", "v4", 32 * 2**30, 300e9, cores=2),
  "v5e": Chip("TPU v5 lite", "v5e", 16e9, 200e9),
  "v5p": Chip("TPU v5", "v5p", 95e9, 600e9, cores=2),
  "v6e": Chip("TPU v6 lite", "v6e", 32e9, 400e9),
  "tpu7x": Chip("TPU7x", "7x", 96e9, 300e9, devices=2),
}


# bfloat16 FLOP/s without sparsity, by JAX's device_kind; the first that matches.
# Source: NVIDIA's data sheets of the A100, L4, L40S, H100, H200 and B200.
_GPU_FLOPS: tuple[tuple[str, float], ...] = (
  (r"A100", 312e12),
  (r"L40S", 362e12),
  (r"L4\b", 121e12),
  (r"H100.*PCIe", 756e12),
  (r"H[12]00.*NVL", 835e12),
  (r"H[12]00", 989e12),
  (r"B200", 2250e12),
)


# Settings that libtpu reads at start: it searches no hardware, and lets other processes
# start it too. The type is of the host that it takes this one for; without one it complains.
_NO_HARDWARE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def peak_flops(device_kind: str) -> float | None:
  """Returns the bfloat16 FLOP/s of a `jax.Device.device_kind`, None if it is not known."""
  if name := chip_of_kind(device_kind):
    return CHIPS[name].flops
  return next((flops for kind, flops in _GPU_FLOPS if re.search(kind, device_kind)), None)


def chip_of_kind(device_kind: str) -> str | None:
  """Returns the name in CHIPS of a `jax.Device.device_kind`, None if it is no TPU known here."""
  for name, chip in CHIPS.items():
    if device_kind in (chip.device_kind, f"TPU {name}"):
      return name
  return None


def chip_of(topology: str) -> Chip:
  """Returns the chip of a slice such as "v5p:2x2x4"; raises TopologyError if it is not known."""
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", topology)
  if not match or match[1] not in CHIPS:
    raise TopologyError(
      f"topology {topology!r}: write CHIP:SHAPE with a chip of {', '.join(CHIPS)}, such as "
      "v5e:8x8 or v5p:2x2x4"
    )
  return CHIPS[match[1]]


def slice_devices(topology: str) -> list[Any]:
  """Returns the compile-only devices of a slice such as "v5p:2x2x4".

  Raises TopologyError if the slice does not exist or libtpu is not installed.
  """
  chip = chip_of(topology)
  if importlib.util.find_spec("libtpu") is None:
    raise TopologyError(
      "compiling for TPUs needs libtpu, which is not installed: pip install -e '.[tpu]'"
    )
  os.environ.update(_NO_HARDWARE)
  try:
    devices = topologies.get_topology_desc(
      topology, platform="tpu", chip_config_name="megacore" if chip.cores == 2 else "default"
    ).devices
  except Exception as error:  # libtpu raises various types for a wrong shape
    raise TopologyError(
      f"libtpu knows no topology {topology!r}: {str(error).splitlines()[0]}"
    ) from error
  chips = math.prod(int(n) for n in topology.split(":")[1].split("x"))
  if len(devices) != chips * chip.devices:
    raise TopologyError(f"topology {topology!r} has {chips} chips but {len(devices)} devices")
  return list(devices)
