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

from bis_jax.errors import UserError


class TopologyError(UserError):
  """An unknown slice; the message lists the known ones."""


@dataclasses.dataclass(frozen=True)
class Chip:
  device_kind: str  # JAX's name of the device of one chip
  cores: int  # TensorCores; two work as one device
  hbm_bytes: float  # rounded down where the source says GB
  flops: float  # bfloat16 FLOP/s
  hbm_bandwidth: float  # bytes per second
  link_bandwidth: float  # bytes per second to all neighbours together, one way


# Source: Google Cloud TPU documentation, "System architecture" of TPU v4, v5e, v5p and v6e
# (cloud.google.com/tpu/docs/v4 and so on). Link bandwidth is half of the bidirectional figure.
CHIPS: dict[str, Chip] = {
  "v4": Chip("TPU v4", 2, 32 * 2**30, 275e12, 1200e9, 300e9),
  "v5e": Chip("TPU v5 lite", 1, 16e9, 197e12, 819e9, 200e9),
  "v5p": Chip("TPU v5", 2, 95e9, 459e12, 2765e9, 600e9),
  "v6e": Chip("TPU v6 lite", 1, 32e9, 918e12, 1638e9, 400e9),
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
  for name, chip in CHIPS.items():
    if device_kind in (chip.device_kind, f"TPU {name}"):
      return chip.flops
  return next((flops for kind, flops in _GPU_FLOPS if re.search(kind, device_kind)), None)


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
  """Returns one compile-only device per chip of a slice such as "v5p:2x2x4".

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
  if len(devices) != chips:
    raise TopologyError(f"topology {topology!r} has {chips} chips but {len(devices)} devices")
  return list(devices)
