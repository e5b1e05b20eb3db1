"""The TPU compiler's plan of a program: its instructions in order and their buffers.

Machine code, which takes nine tenths of a compilation, changes neither. No option of the compiler
stops it there, so it writes its plan to files, and the process that it runs in is ended.
"""

import concurrent.futures
import contextlib
import multiprocessing
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from bis_jax.errors import UserError

_TOTAL = re.compile(r"Memory Space: default .*\nTotal bytes: (\d+)")
_POLL_SECONDS = 0.1


class Program(NamedTuple):
  """What one device runs."""

  text: str  # HLO
  total: int  # bytes of HBM, machine code included
  code: int  # bytes of machine code; 0 if none was generated


def whole(lowered: jax.stages.Lowered) -> Program:
  with _dumped() as (folder, options):
    return _finished(lowered.compile(options), folder)


def planned(lowered: jax.stages.Lowered) -> Program:
  """Returns a program without machine code, on which a thread works on: call this `in_child`."""
  compiler = concurrent.futures.ThreadPoolExecutor(1)
  with _dumped() as (folder, options):
    compiling = compiler.submit(lowered.compile, options)
    while not compiling.done():
      if program := _read(folder):
        return program
      time.sleep(_POLL_SECONDS)
    return _finished(compiling.result(), folder)  # from a cache, or it failed


@contextlib.contextmanager
def _dumped() -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
  """Gives a folder and the compiler options that let the plan be written there."""
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    yield pathlib.Path(folder), {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def _finished(compiled: jax.stages.Compiled, folder: pathlib.Path) -> Program:
  memory = compiled.memory_analysis()
  assert memory  # optional in JAX, but TPU programs have it
  # Its temp_size_in_bytes counts copies of what loops carry again: on v5e a program compiles that
  # takes 17.3 GB by it, where the compiler refuses more than 16.9 GB.
  code = memory.generated_code_size_in_bytes
  program = _read(folder) or Program(compiled.as_text() or "", memory.peak_memory_in_bytes, 0)
  return program._replace(total=program.total + code, code=code)


def _read(folder: pathlib.Path) -> Program | None:
  # The last file of the plan is there, so the others are whole.
  if not any(folder.glob("*.after_optimizations_after_buffer_assignment.txt")):
    return None
  [program] = folder.glob("*.after_optimizations.txt")
  [memory] = folder.glob("*-memory-usage-report.txt")
  total = _TOTAL.search(memory.read_text())
  assert total, memory
  return Program(program.read_text(), int(total[1]), code=0)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
  """Returns or raises what function(*arguments) does in a new process, which is ended then."""
  spawn = multiprocessing.get_context("spawn")
  ours, theirs = spawn.Pipe(duplex=False)
  child = spawn.Process(target=_send, args=(theirs, function, arguments), daemon=True)
  child.start()
  theirs.close()
  try:
    result = ours.recv()
  except EOFError as error:
    child.join()
    raise UserError(
      f"the process of the TPU compiler ended with {child.exitcode}: it may need more memory"
    ) from error
  finally:
    child.kill()
    child.join()
  if isinstance(result, Exception):
    raise result
  return result


def _send(connection: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
  jax.config.update("jax_platforms", "cpu")  # it must not look for accelerators either
  try:
    result = function(*arguments)
  except Exception as error:
    result = error
  connection.send(result)
