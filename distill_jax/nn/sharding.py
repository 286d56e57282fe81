"""Logical axes to mesh axes: the one table, and what is derived from it.

Models name logical axes only; the fused head is told the mesh axes of sequences and vocabulary,
BATCH and VOCAB by default. A parameter is kept as the storage column says and, where it is used,
gathered as the compute column says; activations follow the compute column.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from distill_jax.errors import InputError
from distill_jax.nn import params
from distill_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """The device mesh: the number of devices on each axis."""

  data: int = 1
  """Devices on the data axis: sequences are split, parameters are copied. -1: all remaining
  devices. Only this axis may span several slices."""
  fsdp: int = -1
  """Devices on the FSDP axis: sequences and stored parameters are split. -1: all remaining
  devices."""
  tensor: int = 1
  """Devices on the tensor axis: heads, feed-forward channels, experts and the vocabulary are split.
  -1: all remaining devices."""


MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # mesh axes over which sequences are spread
VOCAB = "tensor"  # mesh axis over which the vocabulary is spread

# What one array axis is spread over: nothing, a mesh axis, or several.
MeshAxes = str | tuple[str, ...] | None

# logical axis: (storage, compute). `table` is the width of the embedding table: with the
# name `embed` its rows would be looked up along the axis that the batch is sharded over.
TABLE: dict[str, tuple[MeshAxes, MeshAxes]] = {
  "batch": (None, BATCH),
  "seq": (None, None),
  "embed": ("fsdp", None),
  "table": ("fsdp", None),
  "vocab": (VOCAB, VOCAB),
  "heads": ("tensor", "tensor"),
  "kv_heads": ("tensor", "tensor"),
  "head_dim": (None, None),
  "mlp": ("tensor", "tensor"),
  "latent": (None, None),  # narrow, between two products; the second reads it as the next
  "from_latent": ("fsdp", None),
  "norm": (None, None),
  "bias": (None, None),
  "experts": ("tensor", "tensor"),
  "expert_mlp": (None, None),
  "routes": (None, None),  # the experts, where a router chooses among them
  "classes": (None, None),  # few
  "places": (None, None),  # learned positions, and kinds of segments
  "channels": (None, None),  # of an image or a sound
  "pixels": (None, None),  # height or width of a patch
  "one": (None, None),  # an axis that Hugging Face has with nothing along it
  "layers": (None, None),
  "encoder_layers": (None, None),  # of a model that has a decoder beside its encoder
  "filters": (None, None),  # of a convolution, as the next
  "kernel": (None, None),
  "rank": (None, None),  # of low-rank adapters
  "pairs": (None, None),  # of adapters, as the next
  "teacher_embed": (None, None),
}


def mesh_axis_names(axes: MeshAxes) -> tuple[str, ...]:
  """The mesh axes that one entry of a rule or of a PartitionSpec names."""
  return (axes,) if isinstance(axes, str) else axes or ()


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis to mesh axis, in two columns. Hashable, so that jit may close over it."""

  table: tuple[tuple[str, tuple[MeshAxes, MeshAxes]], ...] = tuple(TABLE.items())

  def spec(self, axes: tuple[str, ...], column: str) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; a collision raises."""
    table, which = dict(self.table), ("storage", "compute").index(column)
    unknown = [a for a in axes if a not in table]
    if unknown:
      raise InputError(f"logical axis {unknown[0]!r} has no rule; there are {sorted(table)}")
    names = tuple(table[a][which] for a in axes)
    used = [mesh_axis for name in names for mesh_axis in mesh_axis_names(name)]
    if len(set(used)) < len(used):
      raise InputError(f"axes {axes} map onto {names}: a mesh axis is used twice; change the rules")
    return PartitionSpec(*names)


def rules(changes: Mapping[str, tuple[str, ...]]) -> Rules:
  """The table with some rows of a config's own: {"experts": ("fsdp", "tensor")}.

  Each row is (storage, compute), mesh axes by name: "" is none, "fsdp,tensor" both.

  Raises:
    InputError: a logical or a mesh axis is unknown, or a row is no pair.
  """
  table = dict(TABLE)
  for axis, row in changes.items():
    parts = [tuple(p for p in side.split(",") if p) for side in row]
    unknown = [m for part in parts for m in part if m not in MESH_AXES]
    if axis not in table or len(row) != 2 or unknown:
      raise InputError(
        f"rules.{axis} is {row}; a rule is (storage, compute) of mesh axes {', '.join(MESH_AXES)} "
        f"for one of {', '.join(table)}"
      )
    storage, compute = (part[0] if len(part) == 1 else part or None for part in parts)
    table[axis] = storage, compute
  return Rules(tuple(table.items()))


def make_mesh(
  data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh with axes (data, fsdp, tensor); -1, on one axis at most, means the rest.

  Where devices are in several slices, `data` alone goes over the slow network between them.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(data, fsdp, tensor, len(devices))
  slices = len({getattr(d, "slice_index", None) for d in devices})
  if shape[0] % slices:
    raise InputError(
      f"mesh.data is {shape[0]} and there are {slices} slices, over which the data axis alone is "
      f"spread; set mesh.data to a multiple of {slices}"
    )
  split = {"allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, **split)
  else:
    within = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, **split)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
  """The sizes of the mesh axes over so many devices, the -1 among them resolved."""
  shape = [data, fsdp, tensor]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    raise InputError(f"mesh {shape}: sizes are at least 1, and one at most is -1 (the rest)")
  if -1 in shape:
    known = -math.prod(shape)
    if devices % known:
      raise InputError(f"mesh {shape} does not divide the {devices} devices here")
    shape[shape.index(-1)] = devices // known
  if math.prod(shape) != devices:
    raise InputError(
      f"mesh {dict(zip(MESH_AXES, shape, strict=True))} wants {math.prod(shape)} devices and there "
      f"are {devices}; set mesh.fsdp=-1 to use them all"
    )
  return shape[0], shape[1], shape[2]


def shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
  """The storage sharding of every leaf: parameters by their axes, the rest replicated.

  Raises:
    InputError: an axis does not divide over its mesh axes, named with the parameter.
  """

  def sharding_of(path: KeyPath, v: PyTree) -> PyTree:
    if not params.is_param(v):
      return NamedSharding(mesh, PartitionSpec())
    if not jax.tree.leaves(v):  # moments of what is not trained
      return v
    spec = rules.spec(v.get_metadata()["axes"], "storage")
    for axis, n, part in zip(v.get_metadata()["axes"], v.shape, spec, strict=True):
      ways = math.prod(mesh.shape[m] for m in mesh_axis_names(part))
      if n % ways:
        raise InputError(
          f"{params.dotted(path)}: axis {axis!r} of size {n} does not divide over mesh axis "
          f"{part!r} of size {ways}; choose another mesh or another rule for {axis!r}"
        )
    return v.replace(NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(sharding_of, tree, is_leaf=params.is_param)


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
  """Returns a tree of shapes that carry their shardings, as `jit(...).lower` and orbax take it."""

  def place(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(place, abstract, shardings)


def constrain(x: jax.Array, axes: str, rules: Rules) -> jax.Array:
  """Pins an activation's sharding, as `constrain(x_BTD, "batch seq embed", rules)`."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, rules.spec(tuple(axes.split()), "compute"))


def check_batch(name: str, size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Refuses a batch (config key `name`) that does not divide over the mesh's batch axes."""
  ways = math.prod(mesh.shape[a] for a in BATCH)
  if size < 1 or size % (ways * accumulate):
    micro = f" in {accumulate} microbatches" if accumulate > 1 else ""
    raise InputError(
      f"{name} is {size}, which does not divide over {ways} devices{micro}; take a multiple of "
      f"{ways * accumulate}"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """How a batch's first axis is spread."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())
