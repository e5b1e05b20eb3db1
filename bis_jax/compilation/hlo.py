"""HBM and collective bytes of one execution on one device, parsed from `compiled.as_text()`.

XLA's `cost_analysis` ignores the trip counts of while loops. Here a loop body is multiplied by the
trip count, the only integer constant in the loop condition (1 if there is none or more than one).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_LOOP = re.compile(r"condition=%([^, ]+), body=%([^, ]+)")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?(%[^,} ]+(?:, %[^,} ]+)*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_LIMIT = re.compile(r"^\s+%\S+ = [su]32\[\]\S* constant\((\d+)\)")

# Opcodes that write nothing: views, control flow, and the starts of asynchronous operations.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional"}
_FREE |= {"call", "copy-start", "collective-permute-start", "all-gather-start", "all-reduce-start"}

_CALLERS = {"fusion", "call", "conditional", "async-start"}

_Computations = dict[str, list[str]]


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
  """Returns kind -> (count, bytes): results received, but for a reduce-scatter operands sent."""
  counts, moved = Counter(), Counter()
  for trips, shape, opcode, rest, shapes in _executed(_computations(hlo)):
    kind = opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      continue
    sizes = [size for size, _ in _arrays(shape)]
    # A start returns (operands, results, counters): the larger half is what moves.
    size = max(sizes) if opcode.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter":
      operands = re.findall(r"%([^,) ]+)", rest.split(")")[0])
      size = sum(s for operand in operands for s, _ in _arrays(shapes.get(operand, "")))
    counts[kind] += trips
    moved[kind] += trips * size
  return {kind: (counts[kind], moved[kind]) for kind in COLLECTIVES if kind in counts}


def hbm_bytes(hlo: str) -> int:
  """Returns the approximate HBM traffic, one write and one read per result in HBM."""
  # Results in vector memory (memory space 1) and in-place updates are not counted.
  total, computations = 0, _computations(hlo)
  for trips, shape, opcode, rest, _ in _executed(computations):
    called = _CALLED.search(rest) if opcode == "fusion" else None
    root = computations.get(called[1][1:], [""])[-1] if called else rest
    if opcode in _FREE or "dynamic-update-slice" in root or '"AllocateBuffer"' in rest:
      continue
    total += trips * 2 * sum(size for size, space in _arrays(shape) if space == 0)
  return total


def _computations(hlo: str) -> _Computations:
  """Instruction lines by computation, the root last; "ENTRY" is the entry computation."""
  computations: _Computations = {}
  lines: list[str] = []
  for line in hlo.splitlines():
    if header := _HEADER.match(line):
      lines = computations["ENTRY" if header[1] else header[2]] = []
    elif line.startswith("  "):
      lines.append(_COMMENT.sub("", line))
  return computations


def _executed(
  computations: _Computations, name: str = "ENTRY", trips: int = 1
) -> Iterator[tuple[int, str, str, str, dict[str, str]]]:
  """Yields (execution count, shape, opcode, rest of the line, shapes by name) per instruction."""
  # Of the instructions inside fusions only collectives are yielded.
  parsed = [match for line in computations.get(name, ()) if (match := _INSTRUCTION.match(line))]
  shapes = {match[1]: match[2] for match in parsed}
  for match in parsed:
    _, shape, opcode, rest = match.groups()
    yield trips, shape, opcode, rest, shapes
    if opcode == "while" and (loop := _LOOP.search(rest)):
      limits = [m[1] for line in computations.get(loop[1], ()) if (m := _LIMIT.match(line))]
      count = int(limits[0]) if len(limits) == 1 else 1
      yield from _executed(computations, loop[2], trips * count)
    elif opcode in _CALLERS and (called := _CALLED.search(rest)):
      for inner in re.findall(r"%([^,} ]+)", called[1]):
        for item in _executed(computations, inner, trips):
          if opcode != "fusion" or item[2].removesuffix("-start") in COLLECTIVES:
            yield item


def _arrays(shape: str) -> Iterator[tuple[int, int]]:
  """(bytes, memory space) per array of a shape like "(bf16[8,4]{1,0:T(8,128)S(1)}, f32[2])"."""
  for name, bits, dims, layout in _ARRAY.findall(shape):
    count = math.prod(int(n) for n in dims.split(",") if n)
    space = re.search(r"S\((\d)\)", layout)
    yield count * (8 if name == "pred" else int(bits)) // 8, int(space[1]) if space else 0
