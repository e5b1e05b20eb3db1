"""What one execution moves and multiplies on one device, parsed from `compiled.as_text()`.

XLA's `cost_analysis` ignores the trip counts of while loops. Here a loop body is multiplied by the
trip count, the only integer constant in the loop condition (1 if there is none or more than one).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_LOOP = re.compile(r"condition=%([^, ]+), body=%([^, ]+)")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?(%[^,} ]+(?:, %[^,} ]+)*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([^,) ]+)")
_ORIGIN = re.compile(r'op_name="([^"]*)"')

_CALLERS = {"fusion", "call", "call-start", "conditional", "async-start"}
# Opcodes that move nothing: views, control flow, and the ends of asynchronous operations.
_FREE = _CALLERS - {"fusion"} | {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
_FREE |= {"while", "partition-id", "replica-id", "after-all", "optimization-barrier"}

_VIEWS = {"bitcast", "get-tuple-element"}
_PARTS = {"dynamic-slice", "slice", "gather"}  # read as much of their first operand as they return


class Operation(NamedTuple):
  """What the instructions of one origin move through HBM."""

  name: str  # opcode, and where in the program it comes from
  calls: int
  bytes: int


class _Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  rest: str
  root: bool

  @property
  def operands(self) -> list[str]:
    return _OPERAND.findall(self.rest.split(")")[0])

  @property
  def is_view(self) -> bool:
    """Whether an instruction inside a fusion only changes the layout in which its operand is seen."""
    aliased = "output_to_operand_aliasing={{}: (0, {})}" in self.rest
    return self.opcode in _VIEWS or (self.opcode == "fusion" and aliased)

  @property
  def called(self) -> list[str]:
    found = _CALLED.search(self.rest)
    return re.findall(r"%([^,} ]+)", found[1]) if found else []


_Computation = dict[str, _Instruction]


class Program:
  """A compiled program's text, parsed once."""

  def __init__(self, text: str):
    self._computations: dict[str, _Computation] = {}
    lines: _Computation = {}
    for line in text.splitlines():
      if header := _HEADER.match(line):
        lines = self._computations["ENTRY" if header[1] else header[2]] = {}
      elif match := _INSTRUCTION.match(_COMMENT.sub("", line) if line[:2] == "  " else ""):
        root, name, shape, opcode, rest = match.groups()
        lines[name] = _Instruction(name, shape, opcode, rest, bool(root))

  def collectives(self) -> dict[str, tuple[int, int]]:
    """Returns kind -> (count, bytes): results received, but for a reduce-scatter operands sent."""
    counts, moved = Counter(), Counter()
    for trips, one, near in self._executed("ENTRY", fused=True):
      kind = one.opcode.removesuffix("-start")
      if kind not in COLLECTIVES:
        continue
      sizes = [size for size, _ in _arrays(one.shape)]
      # A start returns (operands, results, counters): the larger half is what moves.
      size = max(sizes) if one.opcode.endswith("-start") else sum(sizes)
      if kind == "reduce-scatter":
        shapes = (near[operand].shape for operand in one.operands if operand in near)
        size = sum(s for shape in shapes for s, _ in _arrays(shape))
      counts[kind] += trips
      moved[kind] += trips * size
    return {kind: (counts[kind], moved[kind]) for kind in COLLECTIVES if kind in counts}

  def operations(self) -> list[Operation]:
    """Returns what moves through HBM, by origin, the largest first.

    Every instruction reads its operands and writes its results, unless they are in vector memory; of
    an operand that it slices, and a result that it updates in place, only that part. What a Pallas
    kernel reads more than once is counted once.
    """
    calls, moved = Counter(), Counter()
    for trips, one, near in self._executed("ENTRY", fused=False):
      if size := self._moved(one, near):
        origin = _ORIGIN.search(one.rest)
        name = f"{one.opcode} {origin[1]}" if origin else one.opcode
        calls[name] += trips
        moved[name] += trips * size
    return [Operation(name, calls[name], size) for name, size in moved.most_common()]

  def hbm_bytes(self) -> int:
    return sum(operation.bytes for operation in self.operations())

  def matmul_flops(self) -> int:
    """Returns the FLOPs of matrix products, those of Pallas kernels and with batch axes left out."""
    total = 0
    for trips, one, near in self._executed("ENTRY", fused=True):
      if one.opcode in ("convolution", "dot") and "lhs_dilate" not in one.rest:
        # [m, k] x [k, n] -> [m, n] has (m k n) ** 2 = (m k) (k n) (m n), in any layout.
        sizes = (_count(near[operand].shape) for operand in one.operands)
        total += trips * 2 * math.isqrt(math.prod(sizes) * _count(one.shape))
    return total

  def _executed(
    self, computation: str, *, fused: bool, trips: int = 1
  ) -> Iterator[tuple[int, _Instruction, _Computation]]:
    """Yields (execution count, instruction, its computation), those inside fusions if `fused`."""
    near = self._computations.get(computation, {})
    for one in near.values():
      yield trips, one, near
      if one.opcode == "while" and (loop := _LOOP.search(one.rest)):
        yield from self._executed(loop[2], fused=fused, trips=trips * self._trips(loop[1]))
      elif one.opcode in _CALLERS and (fused or one.opcode != "fusion"):
        for called in one.called:
          yield from self._executed(called, fused=fused, trips=trips)

  def _trips(self, condition: str) -> int:
    limits = [
      int(one.rest.split(")")[0])
      for one in self._computations.get(condition, {}).values()
      if one.opcode == "constant" and re.match(r"[su]32\[\]", one.shape)
    ]
    return limits[0] if len(limits) == 1 else 1

  def _moved(self, one: _Instruction, near: _Computation) -> int:
    ends = one.opcode.endswith(("-done", "-update"))  # of what a start has begun
    if one.opcode in _FREE or ends or '"AllocateBuffer"' in one.rest:
      return 0
    operands = [near[operand] for operand in one.operands if operand in near]
    if one.opcode == "slice-start":  # of (operand, result, counter)
      size, space = [*_arrays(one.shape)][1]
      return size * (2 if space == 0 else 1)
    if one.opcode.endswith("-start"):  # of operands and results
      return _hbm(one.shape)
    if one.opcode == "fusion":
      [body] = one.called
      read = sum(
        self._read(body, index) for index, operand in enumerate(operands) if _hbm(operand.shape)
      )
      return read + self._written(body, one.shape)
    if one.opcode == "dynamic-update-slice":
      return 2 * _hbm(operands[1].shape) if len(operands) > 1 else 0
    if one.opcode in _PARTS:
      return 2 * _hbm(one.shape)
    return _hbm(one.shape) + sum(_hbm(operand.shape) for operand in operands)

  def _read(self, computation: str, index: int) -> int:
    """Bytes that a fused computation reads of its parameter `index`."""
    near = self._computations.get(computation, {})
    for one in near.values():
      if one.opcode == "parameter" and one.rest.startswith(f"{index})"):
        return min(self._read_from(near, one.name), _bytes(one.shape))
    return 0

  def _read_from(self, near: _Computation, name: str) -> int:
    total = 0
    for user in near.values():
      if name not in user.operands:
        continue
      position = user.operands.index(name)
      if user.is_view:
        total += _bytes(user.shape) if user.root else self._read_from(near, user.name)
      elif user.opcode in _PARTS and position == 0:
        total += _bytes(user.shape)
      elif user.opcode == "fusion":
        total += self._read(user.called[0], position)
      elif user.opcode != "tuple" and (user.opcode, position) != ("dynamic-update-slice", 0):
        total += _bytes(near[name].shape)
    return total

  def _written(self, computation: str, shape: str) -> int:
    """Bytes of a fusion's results in HBM; of one that is updated in place, the update."""
    near = self._computations.get(computation, {})
    roots = [one for one in near.values() if one.root]
    if roots and roots[0].opcode == "tuple":
      roots = [near[operand] for operand in roots[0].operands]
    results, total = list(_arrays(shape)), 0
    for (size, space), root in zip(results, roots, strict=False):
      while root.is_view and root.operands[0] in near:
        root = near[root.operands[0]]
      if root.opcode == "dynamic-update-slice":
        size = _bytes(near[root.operands[1]].shape)
      total += size if space == 0 else 0
    return total if roots else _hbm(shape)


def _count(shape: str) -> int:
  [(_, _, dims, _)] = _ARRAY.findall(shape)
  return math.prod(int(n) for n in dims.split(",") if n)


def _bytes(shape: str) -> int:
  return sum(size for size, _ in _arrays(shape))


def _hbm(shape: str) -> int:
  return sum(size for size, space in _arrays(shape) if space == 0)


def _arrays(shape: str) -> Iterator[tuple[int, int]]:
  """(bytes, memory space) per array of a shape like "(bf16[8,4]{1,0:T(8,128)S(1)}, f32[2])"."""
  for name, bits, dims, layout in _ARRAY.findall(shape):
    count = math.prod(int(n) for n in dims.split(",") if n)
    space = re.search(r"S\((\d)\)", layout)
    yield count * (8 if name == "pred" else int(bits)) // 8, int(space[1]) if space else 0
