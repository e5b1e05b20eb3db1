"""Whether two processes on CPUs execute the collectives of a program in the same order.

  python -m benchmarks.collective_order [--runs=5]

Starts two processes with a compilation cache and a busy process per core beside them, as often as
asked: as `bis_jax.parallel.processes` joins them, and with JAX's cache turned on again. The program
gathers inside a loop and outside of it. Prints how many runs crashed. Results: benchmarks/RESULTS.md.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, GATHERS, ITERATIONS = 20, 40, 20_000


def child(cached: bool) -> None:
  """Executes the program `STEPS` times as one of the processes; prints the programs it loaded."""
  from bis_jax.parallel import processes

  processes.start()
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  if cached:
    jax.config.update("jax_enable_compilation_cache", True)
  loaded = []
  jax.monitoring.register_event_listener(
    lambda event, **_: loaded.append(event) if event.endswith("cache_hits") else None
  )
  mesh = Mesh(np.array(jax.devices()), ("all",))
  split = PartitionSpec("all")

  def late(x, n):
    return jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, jnp.sin(s[1]) + 1), (0, x))[
      1
    ]

  def gather(x):
    return jax.lax.all_gather(x, "all", tiled=True)

  def program(outside, inside, late_by):
    sums = [gather(late(outside, late_by[0])).sum()]
    inside, _ = jax.lax.scan(
      lambda x, _: (x + gather(x)[: len(x)] / 2, None), late(inside, late_by[1]), None, length=4
    )
    for k in range(GATHERS):
      sums.append(gather(late(outside[: 1000 + 50 * k], late_by[k % 2] // 100 + k)).sum())
    return inside, jnp.stack(sums)

  def put(array):
    return jax.make_array_from_process_local_data(NamedSharding(mesh, split), array)

  step = jax.jit(
    jax.shard_map(program, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
  )
  late_by = np.zeros(2, np.int32)  # each process is late with another part
  late_by[jax.process_index()] = ITERATIONS
  arguments = put(np.ones(4096, np.float32)), put(np.ones(768, np.float32)), put(late_by)
  for _ in range(STEPS):
    jax.block_until_ready(step(*arguments))
  print("loaded", len(loaded), flush=True)
  processes.wait_for_all("end")


def run(cached: bool, cache: str) -> tuple[bool, bool]:
  """Returns whether the two processes of a run ended well and whether one loaded a program."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "benchmarks.collective_order", f"--child={int(cached)}"],
      cwd=ROOT,
      env=os.environ
      | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
      | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
      | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    for i in range(2)
  ]
  said = [process.communicate()[0] for process in started]
  return not any(process.returncode for process in started), "loaded 1" in "".join(said)


def main() -> None:
  """Prints a table of both ways."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--runs", type=int, default=5)
  parser.add_argument("--child", type=int)
  options = parser.parse_args()
  if options.child is not None:
    child(bool(options.child))
    return
  busy = [
    subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())
  ]
  try:
    print("| programs | runs | crashed |\n|---|---|---|")
    for cached, name in ((False, "compiled by every process"), (True, "loaded by process 0")):
      with tempfile.TemporaryDirectory() as cache:
        if cached:
          run(cached, cache)
        ended = [run(cached, cache) for _ in range(options.runs)]
        assert cached or not any(loaded for _, loaded in ended)
      print(f"| {name} | {len(ended)} | {sum(not well for well, _ in ended)} |", flush=True)
  finally:
    for process in busy:
      process.kill()


if __name__ == "__main__":
  main()
