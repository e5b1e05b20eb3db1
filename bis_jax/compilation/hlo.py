"""What one run of a compiled program moves on one device, read from its HLO text.

XLA's own cost analysis counts the body of a loop once, whatever its turns; here a loop over 28
layers counts 28 times. Turns are read from the one integer that a loop's condition compares its
counter with; a loop without one counts as a single turn.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_LOOP = re.compile(r"condition=%([^, ]+), body=%([^, ]+)")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?(%[^,} ]+(?:, %[^,} ]+)*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_LIMIT = re.compile(r"^\s+%\S+ = [su]32\[\]\S* constant\((\d+)\)")

# Name no new bytes: views, control flow, and the halves of an asynchronous operation that start it.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional"}
_FREE |= {"call", "copy-start", "collective-permute-start", "all-gather-start", "all-reduce-start"}

_CALLERS = {"fusion", "call", "conditional", "async-start"}


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
  """Returns kind -> (count, bytes) of a run: what every device receives of results, or, of a
  reduce-scatter, hands over of operands.

  Args:
    hlo: `compiled.as_text()`.
  """
  totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
  for times, shape, operation, rest, shapes in _runs(_computations(hlo)):
    kind = operation.removesuffix("-start")
    if kind not in COLLECTIVES:
      continue
    sizes = [size for size, _ in _arrays(shape)]
    # A started one returns (operands, results, counters): the larger half is what moves.
    size = max(sizes) if operation.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter":
      operands = re.findall(r"%([^,) ]+)", rest.split(")")[0])
      size = sum(s for operand in operands for s, _ in _arrays(shapes.get(operand, "")))
    totals[kind][0] += times
    totals[kind][1] += times * size
  return {kind: tuple(totals[kind]) for kind in COLLECTIVES if kind in totals}


def hbm_bytes(hlo: str) -> int:
  """Returns about how many bytes a run writes to and reads from HBM: every result there, twice.

  Results that stay in the chip's vector memory (space 1) and updates in place are left out.

  Args:
    hlo: `compiled.as_text()`.
  """
  total, bodies = 0, _computations(hlo)
  for times, shape, operation, rest, _ in _runs(bodies):
    called = _CALLED.search(rest) if operation == "fusion" else None
    root = bodies.get(called[1][1:], [""])[-1] if called else rest
    if operation in _FREE or "dynamic-update-slice" in root or '"AllocateBuffer"' in rest:
      continue
    total += times * 2 * sum(size for size, space in _arrays(shape) if space == 0)
  return total


def _computations(hlo: str) -> dict[str, list[str]]:
  """Lines of every computation by its name; "ENTRY" is the one that a run starts with."""
  bodies: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in hlo.splitlines():
    if header := _HEADER.match(line):
      lines = bodies["ENTRY" if header[1] else header[2]] = []
    elif line.startswith("  "):
      lines.append(_COMMENT.sub("", line))  # of a body, the last line is its result
  return bodies


def _runs(
  bodies: dict[str, list[str]], name: str = "ENTRY", times: int = 1
) -> Iterator[tuple[int, str, str, str, dict[str, str]]]:
  """Yields (times run, type, operation, the rest of the line, types by name) of every instruction
  outside of fusions, and of the collectives inside them."""
  parsed = [match for line in bodies.get(name, ()) if (match := _INSTRUCTION.match(line))]
  shapes = {match[1]: match[2] for match in parsed}
  for match in parsed:
    _, shape, operation, rest = match.groups()
    yield times, shape, operation, rest, shapes
    if operation == "while" and (loop := _LOOP.search(rest)):
      yield from _runs(bodies, loop[2], times * _turns(bodies.get(loop[1], [])))
    elif operation in _CALLERS and (called := _CALLED.search(rest)):
      for inner in re.findall(r"%([^,} ]+)", called[1]):
        for run in _runs(bodies, inner, times):
          if operation != "fusion" or run[2].removesuffix("-start") in COLLECTIVES:
            yield run


def _turns(condition: list[str]) -> int:
  limits = [int(match[1]) for line in condition if (match := _LIMIT.match(line))]
  return limits[0] if len(limits) == 1 else 1


def _arrays(shape: str) -> list[tuple[int, int]]:
  """(bytes, memory space) of the arrays of a type such as "(bf16[8,4]{1,0:T(8,128)S(1)}, f32[2])"."""
  found = []
  for name, bits, dims, layout in _ARRAY.findall(shape):
    count = 1
    for n in dims.split(","):
      count *= int(n or 1)
    space = re.search(r"S\((\d)\)", layout)
    found.append((count * (8 if name == "pred" else int(bits)) // 8, int(space[1]) if space else 0))
  return found
