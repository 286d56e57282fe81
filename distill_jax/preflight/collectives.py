"""What a compiled program sends between devices, read from its text.

XLA's own cost analysis counts a loop's body once; here every collective counts as often as its
loops turn. Bytes are those that one device sends, by the ring algorithms: of S bytes over n
devices an all-gather or a reduce-scatter sends S (n-1)/n, an all-reduce twice that.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
DCN = "dcn "  # before the kind of what goes from slice to slice
# Where a gather spans a whole 3D torus, libtpu adds up arrays that are zero elsewhere.
BY_ADDING = "all-gather as all-reduce"
BYTES = {"pred": 1, "bf16": 2}
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_CALL = re.compile(r"(?:^|[ })\]])([a-z][a-z0-9-]*)\(([^)]*)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation)="
  r"(\{[^}]*\}|%?[\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Op:
  """One instruction: what it makes, what it is, and all that is said of it."""

  shape: str
  kind: str
  operands: tuple[str, ...]
  text: str


class Program:
  """A program's text (`compiled.as_text()`) as computations of instructions."""

  def __init__(self, hlo: str, slices: int = 1):
    self.slices = slices
    self._known: dict[str, dict[str, float]] = {}  # what computations send
    self.computations: dict[str, dict[str, Op]] = {}
    for line in hlo.splitlines():
      if line.endswith("{") and not line.startswith((" ", "HloModule")):
        name = line.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
        self.computations[name] = {}
        if line.startswith("ENTRY "):
          self.entry = name
      elif found := _LINE.match(line):
        op = _op(found[2])
        if op is not None:
          self.computations[name][found[1]] = op

  def sent(self) -> dict[str, int]:
    """Bytes that a device sends in one run of the program, by kind."""
    return {kind: round(n) for kind, n in sorted(self._sent(self.entry).items())}

  def _sent(self, name: str) -> dict[str, float]:
    if name in self._known:
      return self._known[name]
    total: dict[str, float] = {}
    for op in self.computations[name].values():
      scattered = name.startswith("all-reduce-scatter")  # how TPUs spell a reduce-scatter
      if (own := self._own(op, scattered)) is not None:
        _add(total, {own[0]: own[1]})
        continue
      inner: dict[str, float] = {}
      for called in _called(op.text):
        _add(inner, self._sent(called))
      if inner:
        _add(total, inner, self._turns(name, op) if op.kind == "while" else 1)
    self._known[name] = total
    return total

  def _own(self, op: Op, scattered: bool) -> tuple[str, float] | None:
    """(kind, bytes) of a collective; None of anything else."""
    if op.kind == "send" and (found := re.search(r'megascale_transfer_type="(\w+)"', op.text)):
      kind, payload = found[1].lower().replace("_", "-"), op.shape.split(", u32[]")[0]
      return DCN + kind, _bytes(payload) * _share(kind, self.slices)
    kind = op.kind.removesuffix("-start")
    if kind not in KINDS:
      return None
    n, size = _group(op.text), float(_bytes(op.shape))
    if kind == "all-gather" and op.kind.endswith("-start"):
      size = size * n / (n + 1)  # its tuple holds the operand too
    if kind == "reduce-scatter":
      size *= n
    if kind == "collective-permute" and op.kind.endswith("-start"):
      size = _bytes(op.shape.split("]")[0] + "]")  # the first of (in, out, …)
    if kind != "all-reduce":
      return kind, size * _share(kind, n)
    if scattered:
      return "reduce-scatter", size * _share("reduce-scatter", n)
    placed = [x for x in op.operands if "dynamic-update-slice" in x]
    return (BY_ADDING if len(placed) == len(op.operands) else kind), size * _share(kind, n)

  def _turns(self, name: str, loop: Op) -> int:
    """How often a loop turns: its counter's first value, and the constant it is compared to.

    Raises:
      ValueError: the text does not say.
    """
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
      return int(found[1])
    condition = self.computations[re.search(r"condition=%?([\w.-]+)", loop.text)[1]]  # type: ignore[index]
    tests = [(op, c) for op, c in self._comparisons(condition) if "direction=LT" in op.text]
    if len(tests) != 1:
      raise ValueError(f"a loop of {name} ends where {len(tests)} counters are compared, not one")
    (test, limit), here = tests[0], self.computations[name]
    counter = condition.get(test.operands[0])
    index = re.search(r"index=(\d+)", counter.text) if counter else None
    start = here.get(loop.operands[0])
    first = None
    if index and start and start.kind == "tuple":
      first = self._constant(here, start.operands[int(index[1])])
    return limit - (first or 0)

  def _comparisons(self, condition: dict[str, Op]) -> Iterator[tuple[Op, int]]:
    for op in condition.values():
      if op.kind == "compare" and (limit := self._constant(condition, op.operands[1])) is not None:
        yield op, limit
      if op.kind == "fusion":  # the comparison is within, its limit a parameter
        for called in _called(op.text):
          inner = dict(self.computations[called])
          for at, given in list(inner.items()):
            if given.kind == "parameter":
              inner[at] = condition.get(op.operands[int(given.operands[0])], given)
          yield from self._comparisons(inner)

  def _constant(self, computation: dict[str, Op], name: str) -> int | None:
    op = computation.get(name)
    while op is not None and op.kind in ("copy", "bitcast"):
      op = computation.get(op.operands[0])
    if op is None or op.kind != "constant" or not op.operands[0].lstrip("-").isdigit():
      return None
    return int(op.operands[0])


def _op(text: str) -> Op | None:
  """An instruction from what stands behind its `=`: shape, opcode(operands), attributes."""
  depth = end = 0
  if text.startswith("("):  # a tuple: up to its closing bracket
    for end, char in enumerate(text):  # noqa: B007
      depth += (char == "(") - (char == ")")
      if not depth:
        break
  else:
    end = text.find(" ")
  found = _CALL.search(text[end:]) if end >= 0 else None
  if found is None:
    return None
  names = re.sub(r"/\*.*?\*/", "", found[2])
  operands = tuple(x.split()[-1].removeprefix("%") for x in names.split(",") if x.strip())
  return Op(text[: end + 1], found[1], operands, text[end:])


def _add(total: dict[str, float], more: dict[str, float], times: int = 1) -> None:
  for kind, n in more.items():
    total[kind] = total.get(kind, 0.0) + n * times


def _called(text: str) -> list[str]:
  return [
    name.strip().removeprefix("%")
    for group in _CALLED.findall(text)
    for name in group.strip("{}").split(",")
  ]


def _bytes(shape: str) -> int:
  """Of all arrays in a shape; S(1)-like layouts and nested tuples do not matter."""
  total = 0
  for dtype, dims in _ARRAY.findall(shape):
    bits = BYTES[dtype] * 8 if dtype in BYTES else int(re.findall(r"\d+", dtype)[0])
    total += math.prod(map(int, filter(None, dims.split(",")))) * bits // 8
  return total


def _group(text: str) -> int:
  """Devices that take part together, in any of the ways that XLA writes them down."""
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return len(found[1].split(","))
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
    return int(found[2])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  return 2 if "source_target_pairs=" in text else 1


def _share(kind: str, n: int) -> float:
  if kind in ("collective-permute", "collective-broadcast"):
    return 1.0
  return (2 if kind == "all-reduce" else 1) * (n - 1) / n
