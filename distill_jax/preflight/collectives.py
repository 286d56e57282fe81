"""Parses the text of a compiled program to count the bytes that it sends between devices.

XLA's own cost analysis counts the body of a loop only once. Here, a collective in a loop is counted
once per iteration. Bytes are those that one device sends, with ring algorithms: for an array of S
bytes over n devices, S (n-1)/n for an all-gather or a reduce-scatter, twice that for an all-reduce.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

DCN = "dcn "  # prefix of the kinds of transfers between slices
# An all-gather over a whole 3D torus is compiled to a sum of arrays that are mostly zero.
BY_ADDING = "all-gather as all-reduce"
BYTES = {"pred": 1, "bf16": 2}
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_CALL = re.compile(r"(?:^|[ })\]])([a-z][a-z0-9-]*)\(([^)]*)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation)="
  r"(\{[^}]*\}|%?[\w.-]+)"
)
_TRANSFER = re.compile(r'megascale_transfer_type="(\w+)"')
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BODY = re.compile(r"body=%?([\w.-]+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_TUPLE_INDEX = re.compile(r"index=(\d+)")


@dataclasses.dataclass(frozen=True)
class Op:
  """An instruction: the shape of its result, its opcode, and the text after the shape."""

  shape: str
  opcode: str
  operands: tuple[str, ...]
  text: str

  @property
  def is_start(self) -> bool:
    """True for the first half of an asynchronous instruction; the second half sends nothing."""
    return self.opcode.endswith("-start")


class Sent(NamedTuple):
  """The bytes that one collective sends, and its kind."""

  kind: str
  bytes: float


Computation = dict[str, Op]  # instructions by the names of their results
Payload = Callable[[Op, int], float]  # (instruction, size of its group) -> bytes


def _result_bytes(op: Op, n: int) -> float:
  return float(_bytes(op.shape))


def _gathered_bytes(op: Op, n: int) -> float:
  # %all-gather.1 = bf16[64,8]{1,0} all-gather(%x), …
  # %ag = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), …: operand and result
  return float(_bytes(op.shape)) * n / (n + 1) if op.is_start else float(_bytes(op.shape))


def _scattered_bytes(op: Op, n: int) -> float:
  # %rs = f32[2,128]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, …: one part of the sum
  return float(_bytes(op.shape)) * n


def _permuted_bytes(op: Op, n: int) -> float:
  # %cp = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[], u32[]) collective-permute-start(%x), …
  return float(_bytes(op.shape.split("]")[0] + "]") if op.is_start else _bytes(op.shape))


# Opcode: (a function that returns S, the bytes of the whole array; the number of ring passes).
# Each pass sends S (n-1)/n; without a pass (0), S is sent.
COLLECTIVES: dict[str, tuple[Payload, int]] = {
  "all-gather": (_gathered_bytes, 1),
  "all-reduce": (_result_bytes, 2),
  "reduce-scatter": (_scattered_bytes, 1),
  "all-to-all": (_result_bytes, 1),
  "ragged-all-to-all": (_result_bytes, 1),
  "collective-permute": (_permuted_bytes, 0),
  "collective-broadcast": (_result_bytes, 0),
}


def _sent_share(kind: str, n: int) -> float:
  """Returns the fraction of the whole array that each of n devices sends."""
  _, passes = COLLECTIVES.get(kind, (_result_bytes, 1))
  return passes * (n - 1) / n if passes else 1.0


class HloText:
  """The parsed text of a program (`compiled.as_text()`): computations and their instructions.

  Args:
    hlo: the text.
    slices: the number of slices that the program runs on.
  """

  def __init__(self, hlo: str, slices: int = 1):
    self.slices = slices
    self._totals: dict[str, dict[str, float]] = {}  # bytes by kind, by computation
    self._chains: dict[str, Op] = {}  # the first instruction of each chain
    self.computations: dict[str, Computation] = {}
    self.roots: dict[str, Op] = {}  # the results of computations
    for line in hlo.splitlines():
      # %turn (state.1: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
      if line.endswith("{") and not line.startswith((" ", "HloModule")):
        name = line.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
        self.computations[name] = {}
        if line.startswith("ENTRY "):
          self.entry = name
      elif match := _LINE.match(line):
        op = _op(match[3])
        if op is not None:
          self.computations[name][match[2]] = op
          if match[1]:
            self.roots[name] = op

  def sent(self) -> dict[str, int]:
    """Returns the bytes that a device sends in one run of the program, by kind."""
    return {kind: round(n) for kind, n in sorted(self._total(self.entry).items())}

  def _total(self, name: str) -> dict[str, float]:
    """Returns the bytes that a device sends in one run of a computation, by kind."""
    if name in self._totals:
      return self._totals[name]
    total: dict[str, float] = {}
    for op in self.computations[name].values():
      if (sent := self._collective(op, name)) is not None:
        _add(total, {sent.kind: sent.bytes})
        continue
      inner: dict[str, float] = {}
      for called in _called(op.text):
        _add(inner, self._total(called))
      if inner:
        _add(total, inner, self._trip_count(name, op) if op.opcode == "while" else 1)
    self._totals[name] = total
    return total

  def _collective(self, op: Op, computation: str) -> Sent | None:
    """Returns what an instruction sends; None if it is not a collective."""
    # A transfer to the other slices:
    # %send.1 = (f32[10,100]{1,0}, u32[], token[]) send(%g, %after), is_host_transfer=true,
    #   frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
    if op.opcode == "send" and (match := _TRANSFER.search(op.text)):
      kind, payload = match[1].lower().replace("_", "-"), op.shape.split(", u32[]")[0]
      return Sent(DCN + kind, _bytes(payload) * _sent_share(kind, self.slices))
    kind = op.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      return None
    # One transfer that overlaps with several fusions is an instruction in each of them:
    # %all-gather.2 = bf16[64,8]{1,0} all-gather(%x), …, frontend_attributes={chain_id="3"}
    if (chain := _CHAIN.search(op.text)) and self._chains.setdefault(chain[1], op) is not op:
      return None
    n = group_size(op.text)
    payload_bytes, _ = COLLECTIVES[kind]
    size = payload_bytes(op, n)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
      # The compiler for TPUs writes a reduce-scatter as a separate computation:
      # %all-reduce-scatter.4 (input: bf16[32,32]) -> bf16[32,16] {
      #   %all-reduce.9 = bf16[32,32]{0,1} all-reduce(%input), replica_groups={{0,2},{1,3}}, …
      #   ROOT %mine = bf16[32,16]{1,0} dynamic-slice(%all-reduce.9), …
      kind = "reduce-scatter"
    share = _sent_share(kind, n)
    if kind == "all-reduce" and all("dynamic-update-slice" in x for x in op.operands):
      # %all-reduce.3 = bf16[64,8]{1,0} all-reduce(%dynamic-update-slice.3), …
      kind = BY_ADDING
    return Sent(kind, size * share)

  def _trip_count(self, name: str, loop: Op) -> int:
    """Returns the number of iterations of a loop in a computation.

    Raises:
      ValueError: The text does not contain it.
    """
    # %loop = (…) while(%start), condition=%ends, body=%turn,
    #   backend_config={"known_trip_count":{"n":"5"}}
    if match := _TRIP_COUNT.search(loop.text):
      return int(match[1])
    # Otherwise, a counter runs from its first value to a constant that it is compared with:
    # %ends (state: (s32[], bf16[64,8])) -> pred[] {
    #   %limit = s32[] constant(7)
    #   %i = s32[] get-tuple-element(%state), index=0
    #   ROOT %lt = pred[] compare(%i, %limit), direction=LT
    named = _CONDITION.search(loop.text)
    assert named is not None
    condition = self.computations[named[1]]
    tests = [(op, c) for op, c in self._comparisons(condition) if "direction=LT" in op.text]
    if len(tests) != 1:
      raise ValueError(
        f"The end of a loop in {name} compares {len(tests)} counters instead of one."
      )
    (test, limit), computation = tests[0], self.computations[name]
    counter = condition.get(test.operands[0])
    index = _TUPLE_INDEX.search(counter.text) if counter else None
    # %start = (s32[], bf16[64,8]{1,0}) tuple(%two, %p), with %two = s32[] constant(2)
    start, first = computation.get(loop.operands[0]), None
    if index and start and start.opcode == "tuple":
      first = _constant(computation, start.operands[int(index[1])])
    return math.ceil((limit - (first or 0)) / (self._step(loop, int(index[1])) if index else 1))

  def _step(self, loop: Op, index: int) -> int:
    """Returns the constant that an iteration adds to an element of a loop's state; 1 by default."""
    # %turn (state.1: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
    #   %j = s32[] add(%i.1, %two)
    #   ROOT %out = (s32[], bf16[64,8]{1,0}) tuple(%j, %all-gather.1)
    named = _BODY.search(loop.text)
    assert named is not None
    body, root = self.computations[named[1]], self.roots.get(named[1])
    counter = body.get(root.operands[index]) if root and root.opcode == "tuple" else None
    if counter is None or counter.opcode != "add":
      return 1
    return _constant(body, counter.operands[1]) or 1

  def _comparisons(self, condition: Computation) -> Iterator[tuple[Op, int]]:
    """Yields the comparisons with a constant, each with the constant."""
    for op in condition.values():
      if op.opcode == "compare" and (limit := _constant(condition, op.operands[1])) is not None:
        yield op, limit
      # %lt = pred[] fusion(%i, %limit), kind=kLoop, calls=%compare: the limit is a parameter
      if op.opcode == "fusion":
        for called in _called(op.text):
          inner = dict(self.computations[called])
          for name, parameter in list(inner.items()):
            if parameter.opcode == "parameter":
              outer = op.operands[int(parameter.operands[0])]
              inner[name] = condition.get(outer, parameter)
          yield from self._comparisons(inner)


def _constant(computation: Computation, name: str) -> int | None:
  """Returns the value of an integer constant or of a copy of one; None for anything else."""
  op = computation.get(name)
  while op is not None and op.opcode in ("copy", "bitcast"):
    op = computation.get(op.operands[0])
  # %limit = s32[]{:T(128)} constant(7)
  if op is None or op.opcode != "constant" or not op.operands[0].lstrip("-").isdigit():
    return None
  return int(op.operands[0])


def _op(text: str) -> Op | None:
  """Parses the text after the `=` of an instruction: shape, opcode(operands), attributes."""
  end = _end_of_tuple(text) if text.startswith("(") else text.find(" ")
  match = _CALL.search(text[end:]) if end >= 0 else None
  if match is None:
    return None
  names = re.sub(r"/\*.*?\*/", "", match[2])
  operands = tuple(x.split()[-1].removeprefix("%") for x in names.split(",") if x.strip())
  return Op(text[: end + 1], match[1], operands, text[end:])


def _end_of_tuple(text: str) -> int:
  """Returns the index of the bracket that closes the first one."""
  depth = 0
  for i, char in enumerate(text):
    depth += (char == "(") - (char == ")")
    if not depth:
      return i
  return len(text) - 1


def _add(total: dict[str, float], more: dict[str, float], times: int = 1) -> None:
  for kind, n in more.items():
    total[kind] = total.get(kind, 0.0) + n * times


def _called(text: str) -> list[str]:
  """Returns the names of the computations that an instruction calls."""
  return [
    name.strip().removeprefix("%")
    for group in _CALLED.findall(text)
    for name in group.strip("{}").split(",")
  ]


def _bytes(shape: str) -> int:
  """Returns the bytes of all arrays in a shape, with any layouts and nested tuples."""
  total = 0
  for dtype, dims in _ARRAY.findall(shape):
    bits = BYTES[dtype] * 8 if dtype in BYTES else int(re.findall(r"\d+", dtype)[0])
    total += math.prod(map(int, filter(None, dims.split(",")))) * bits // 8
  return total


def group_size(text: str) -> int:
  """Returns the number of devices in a group, from any of XLA's notations for groups."""
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):  # {{0,2},{1,3}}
    return len(match[1].split(","))
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):  # [2,4]<=[8]
    return int(match[2])
  # mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, or a part of an axis: {'axis_1':(1)2}
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  return 2 if "source_target_pairs=" in text else 1
