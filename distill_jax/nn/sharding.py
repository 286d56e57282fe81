"""The table that maps logical axes to mesh axes, and the rows of a batch on each process.

Models use logical axes only. The fused head takes the mesh axes of sequences, positions and
vocabulary as arguments. A parameter is stored with the sharding of the storage column and gathered
to that of the compute column where it is used. Activations have the sharding of the compute column.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from distill_jax.errors import InputError, bad_value
from distill_jax.nn import params
from distill_jax.nn.mesh import MESH_AXES, MeshOptions, make_mesh, mesh_shape
from distill_jax.types import PyTree

__all__ = [
  "BATCH",
  "MESH_AXES",
  "SEQ",
  "STORED",
  "TABLE",
  "VOCAB",
  "MeshAxes",
  "MeshOptions",
  "Rows",
  "Rules",
  "batch_sharding",
  "check_batch",
  "constrain",
  "gather",
  "make_mesh",
  "mesh_axis_names",
  "mesh_shape",
  "on_one_device",
  "replicated",
  "row_shards",
  "rows",
  "rules",
  "shardings",
  "with_shardings",
]

BATCH = ("data", "fsdp")  # mesh axes over which sequences are sharded
SEQ = "context"  # mesh axis over which positions are sharded
STORED = ("fsdp", "context")  # mesh axes over which stored parameters are sharded
VOCAB = "tensor"  # mesh axis over which the vocabulary is sharded

# The mesh axes over which one array axis is sharded: none, one, or several.
MeshAxes = str | tuple[str, ...] | None

# logical axis: (storage, compute). `table` is the width of the embedding table. Under the name
# `embed`, its rows would be looked up along the mesh axis over which the batch is sharded.
TABLE: dict[str, tuple[MeshAxes, MeshAxes]] = {
  "batch": (None, BATCH),
  "seq": (None, SEQ),
  "embed": (STORED, None),
  "table": (STORED, None),
  "vocab": (VOCAB, VOCAB),
  "heads": ("tensor", "tensor"),
  "kv_heads": ("tensor", "tensor"),
  "head_dim": (None, None),
  "mlp": ("tensor", "tensor"),
  "latent": (None, None),  # the narrow output of a first product
  "from_latent": (STORED, None),  # the same axis, as the input of a second product
  "norm": (None, None),
  "bias": (None, None),
  "experts": ("tensor", "tensor"),
  "expert_mlp": (None, None),
  "routes": (None, None),  # the experts, as outputs of a router
  "classes": (None, None),
  "places": (None, None),  # learned positions, and segment types
  "channels": (None, None),  # channels of an image, or mel bins of audio
  "pixels": (None, None),  # height or width of an image or a patch
  "one": (None, None),  # an axis of size 1 in the Hugging Face checkpoint
  "layers": (None, None),
  "encoder_layers": (None, None),  # layers of the encoder in an encoder-decoder
  "filters": (None, None),  # channels of a convolution
  "kernel": (None, None),  # width of a convolution
  "rank": (None, None),  # rank of low-rank adapters
  "pairs": (None, None),  # pairs of tapped layers, in the projections that feature losses train
  "teacher_embed": (None, None),  # the teacher's width, in the same projections
}


def mesh_axis_names(axes: MeshAxes) -> tuple[str, ...]:
  """Returns the mesh axes in one entry of a rule or of a PartitionSpec, as a tuple."""
  return (axes,) if isinstance(axes, str) else axes or ()


@dataclasses.dataclass(frozen=True)
class Rules:
  """A map from logical axes to mesh axes, for storage and for compute.

  It is hashable, so that it can be a static value in jit.
  """

  table: tuple[tuple[str, tuple[MeshAxes, MeshAxes]], ...] = tuple(TABLE.items())

  def spec(self, axes: tuple[str, ...], column: str) -> PartitionSpec:
    """Returns the PartitionSpec of an array.

    Args:
      axes: the logical axes of the array.
      column: "storage" or "compute".

    Raises:
      InputError: an axis has no rule, or two axes are sharded over the same mesh axis.
    """
    table, which = dict(self.table), ("storage", "compute").index(column)
    unknown = [a for a in axes if a not in table]
    if unknown:
      raise bad_value("axes", axes, f"names among {', '.join(sorted(table))}", "Fix the name")
    names = tuple(table[a][which] for a in axes)
    used = [mesh_axis for name in names for mesh_axis in mesh_axis_names(name)]
    if len(set(used)) < len(used):
      raise InputError(
        f"The rules shard the axes {axes} over {names}, which uses a mesh axis twice. Change the "
        "rules of the model."
      )
    return PartitionSpec(*names)


def rules(changes: Mapping[str, tuple[str, ...]]) -> Rules:
  """Returns the table with some rows replaced.

  Args:
    changes: new rows by logical axis, e.g. {"experts": ("fsdp", "tensor")}. A row is (storage,
      compute). Each is a comma-separated list of mesh axes, e.g. "fsdp,tensor", or "" for none.

  Raises:
    InputError: a logical or mesh axis is unknown, or a row is not a pair.
  """
  table = dict(TABLE)
  for axis, row in changes.items():
    parts = [tuple(p for p in side.split(",") if p) for side in row]
    unknown = [m for part in parts for m in part if m not in MESH_AXES]
    if axis not in table:
      raise bad_value("rules", axis, f"logical axes among {', '.join(table)}", "Fix the name")
    if len(row) != 2 or unknown:
      expected = f"a pair (storage, compute) of mesh axes among {', '.join(MESH_AXES)}"
      raise bad_value(f"rules.{axis}", row, expected, "Fix the rule")
    storage, compute = (part[0] if len(part) == 1 else part or None for part in parts)
    table[axis] = storage, compute
  return Rules(tuple(table.items()))


def shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
  """Returns the storage sharding of every leaf of a tree.

  Parameters are sharded by their axes; other leaves are replicated.

  Args:
    tree: parameters and other leaves, e.g. an optimizer state; shapes are enough.
    mesh: the mesh.
    rules: the rules of the model.

  Raises:
    InputError: a parameter's axis is not divisible by the size of its mesh axes.
  """

  def sharding_of(path: KeyPath, v: PyTree) -> PyTree:
    if not params.is_param(v):
      return NamedSharding(mesh, PartitionSpec())
    if not jax.tree.leaves(v):  # moments of a parameter that is not trained
      return v
    spec = rules.spec(v.get_metadata()["axes"], "storage")
    for axis, n, part in zip(v.get_metadata()["axes"], v.shape, spec, strict=True):
      ways = math.prod(mesh.shape[m] for m in mesh_axis_names(part))
      if n % ways:
        raise InputError(
          f"{params.dotted(path)}: axis {axis!r} of size {n} is not divisible by {ways}, the size "
          f"of mesh axis {part!r}. Choose another mesh, or another rule for {axis!r}."
        )
    return v.replace(NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(sharding_of, tree, is_leaf=params.is_param)


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
  """Returns a tree of shapes with shardings, for `jit(...).lower` and orbax.

  Args:
    abstract: shapes.
    shardings: the sharding of each shape.
  """

  def place(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(place, abstract, shardings)


def constrain(x: jax.Array, axes: str, rules: Rules) -> jax.Array:
  """Constrains an activation's sharding, e.g. `constrain(x_BTD, "batch seq embed", rules)`.

  Without a mesh it returns the array unchanged.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, rules.spec(tuple(axes.split()), "compute"))


def on_one_device() -> bool:
  """Returns whether there is no mesh in use, or only one device in it."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def gather(x: jax.Array, axes: tuple[str, ...], rules: Rules) -> jax.Array:
  """Returns a parameter with the sharding of the compute column.

  The gradient has the sharding of the storage column, so that it is reduce-scattered. The gradient
  of a sharding constraint alone has the same constraint: every device would sum all of it.

  On one device it returns the array unchanged.

  Args:
    x: the parameter, with the sharding of the storage column.
    axes: its logical axes.
    rules: the rules of the model.
  """
  if on_one_device():
    return x
  storage, compute = (rules.spec(axes, column) for column in ("storage", "compute"))
  # The gathered axes are put first: libtpu 0.0.42.1 makes an all-reduce of a scatter over the last
  # axis if each part has 128 elements.
  order = sorted(range(x.ndim), key=lambda i: storage[i] == compute[i])
  scattered = PartitionSpec(*(storage[i] for i in order))

  @jax.custom_vjp
  def gathered(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, compute)

  def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
    grad = jax.lax.with_sharding_constraint(grad.transpose(order), scattered)
    return (grad.transpose(np.argsort(order)),)

  gathered.defvjp(lambda x: (gathered(x), None), backward)
  return gathered(x)


def row_shards(mesh: Mesh) -> int:
  """Returns the number of groups of devices that hold different rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(name: str, size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Checks that a batch is divisible by the number of devices that hold different sequences.

  Args:
    name: the config key of the batch size.
    size: the batch size.
    mesh: the mesh.
    accumulate: the number of microbatches of a batch.

  Raises:
    InputError: the batch is not divisible.
  """
  ways = row_shards(mesh)
  if size < 1 or size % (ways * accumulate):
    microbatches = f" times {accumulate} microbatches" if accumulate > 1 else ""
    expected = f"a positive multiple of {ways * accumulate} ({ways} devices{microbatches})"
    raise bad_value(name, size, expected, "Change the batch size or the mesh")


def batch_sharding(mesh: Mesh, seq_axis: int | None = None) -> NamedSharding:
  """Returns the sharding of an array of a batch: the first axis over the mesh axes BATCH.

  Args:
    mesh: the mesh.
    seq_axis: the array axis of positions, which is sharded over the mesh axis SEQ; None for none.
  """
  if seq_axis is None or mesh.shape[SEQ] == 1:
    return NamedSharding(mesh, PartitionSpec(BATCH))
  return NamedSharding(mesh, PartitionSpec(BATCH, *(None,) * (seq_axis - 1), SEQ))


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of a batch that one process holds, and those that it writes.

  Row i of a batch is row i of the global array, on every mesh and any number of processes. A
  process holds the rows that its devices need. Where the tensor axis crosses processes, several
  processes hold a row: all of them read it, and one of them, its writer, writes what is computed
  from it. A process may hold parts of several groups of devices: on v5p:4x4x4 with the mesh
  (1, 16, 4), each of the 16 hosts holds 2 of 16 blocks of rows, shares both with another host, and
  writes one.

  Attributes:
    mesh: The mesh.
    process: Index of the process.
    held: Indices of the rows that the process holds, in order.
    writer_B: The process that writes each row of the batch. The rows are divided evenly among the
      processes that hold them, if they can be. Process 0 is one of the writers.
  """

  mesh: Mesh
  process: int
  held: np.ndarray
  writer_B: np.ndarray

  @property
  def size(self) -> int:
    """Number of rows of the batch."""
    return len(self.writer_B)

  @property
  def written(self) -> np.ndarray:
    """Indices of the rows that the process writes, in order."""
    return np.flatnonzero(self.writer_B == self.process)


def rows(mesh: Mesh, size: int, process: int | None = None) -> Rows:
  """Returns the rows of a batch that a process holds and writes.

  Args:
    mesh: The mesh.
    size: Number of rows of the batch; see `check_batch`.
    process: Index of the process; None for this process.
  """
  process = jax.process_index() if process is None else process
  holders: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
  index_of = batch_sharding(mesh).devices_indices_map((size,))
  for device in mesh.devices.flat:
    start, stop, _ = index_of[device][0].indices(size)
    holders[start, stop].add(device.process_index)
  held, writer_B = np.zeros(size, bool), np.zeros(size, np.int32)
  blocks: collections.Counter[int] = collections.Counter()  # number of blocks per writer
  for (start, stop), processes in sorted(holders.items()):
    writer = min(processes, key=lambda p: (blocks[p], p))
    blocks[writer] += 1
    writer_B[start:stop] = writer
    held[start:stop] = process in processes
  return Rows(mesh, process, np.flatnonzero(held), writer_B)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds completely."""
  return NamedSharding(mesh, PartitionSpec())
