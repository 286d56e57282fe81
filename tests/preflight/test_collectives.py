"""The bytes that a compiled step sends between devices, parsed from its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.nn import sharding
from distill_jax.preflight import collectives

pytestmark = pytest.mark.smoke


def test_collectives_in_a_loop_are_counted_once_per_iteration():
  mesh = sharding.make_mesh(fsdp=4)

  def here(x):
    def turn(x, _):
      whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # 4 times [8, 16] float32
      return jax.lax.psum(jnp.sin(x + whole[:8]), "fsdp"), None

    x, _ = jax.lax.scan(turn, x, length=5)
    return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])

  f = jax.shard_map(
    here,
    mesh=mesh,
    in_specs=PartitionSpec("fsdp"),
    out_specs=PartitionSpec("fsdp"),
    check_vma=False,
  )
  where = NamedSharding(mesh, PartitionSpec("fsdp"))
  compiled = jax.jit(f).lower(jax.ShapeDtypeStruct((32, 16), "float32", sharding=where)).compile()
  mine = 8 * 16 * 4
  sent = collectives.HloText(compiled.as_text()).sent()
  assert sent == {
    "all-gather": 5 * 3 * mine,
    "all-reduce": 5 * 2 * mine * 3 // 4,
    "collective-permute": mine,
  }


TPU_TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.4 (input: bf16[32,32]) -> bf16[32,16] {
  %input = bf16[32,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.9 = bf16[32,32]{0,1:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %mine = bf16[32,16]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={32,16}
}

%ends (state: (s32[], bf16[64,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %state = (s32[]{:T(128)}, bf16[64,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%turn (state.1: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %state.1 = (s32[], bf16[64,8]{1,0}) parameter(0)
  %all-gather.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %scattered = bf16[32,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.4
  ROOT %out = (s32[], bf16[64,8]{1,0}) tuple(%j, %all-gather.1)
}

ENTRY %main (p: bf16[64,8]) -> bf16[64,8] {
  %two = s32[] constant(2)
  %start = (s32[], bf16[64,8]{1,0}) tuple(%two, %p)
  %loop = (s32[], bf16[64,8]{1,0}) while(%start), condition=%ends, body=%turn
  %dynamic-update-slice.3 = bf16[64,8]{1,0} fusion(%p), kind=kLoop, calls=%fused
  %all-reduce.3 = bf16[64,8]{1,0} all-reduce(%dynamic-update-slice.3), replica_groups=[2,4]<=[8], to_apply=%add
  %send.1 = (f32[10,100]{1,0}, u32[], token[]) send(%g, %after), is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %r = bf16[64,8]{1,0} get-tuple-element(%loop), index=1
}

%fused (q: bf16[64,8]) -> bf16[64,8] {
  ROOT %q = bf16[64,8]{1,0} parameter(0)
}
"""  # noqa: E501


def test_notations_in_tpu_programs():
  """A loop from 2 to 7, a reduce-scatter in a fusion, a gather by addition, a second slice."""
  assert collectives.HloText(TPU_TEXT, slices=2).sent() == {
    "all-gather": 5 * 64 * 8 * 2 * 3 // 4,
    "all-gather as all-reduce": 64 * 8 * 2 * 2 * 3 // 4,
    "dcn all-reduce": 10 * 100 * 4,
    "reduce-scatter": 5 * 32 * 32 * 2 // 2,
  }


def test_a_loop_in_steps_of_two():
  """The loop from 2 to 7 has three iterations."""
  add = "  %two.1 = s32[] constant(2)\n  %j = s32[] add(%i.1, %two.1)\n  ROOT %out"
  sent = collectives.HloText(TPU_TEXT.replace("  ROOT %out", add), slices=2).sent()
  assert sent["all-gather"] == 3 * 64 * 8 * 2 * 3 // 4


def test_a_transfer_during_several_fusions_is_counted_once():
  chain = 'dimensions={0}, frontend_attributes={chain_id="3"}\n'
  first = TPU_TEXT.replace("dimensions={0}\n", chain)
  line = next(line for line in first.splitlines() if "chain_id" in line)
  both = first.replace(line, line + "\n" + line.replace("all-gather.1 ", "all-gather.2 "))
  assert both.count("chain_id") == 2
  assert collectives.HloText(both, slices=2).sent() == collectives.HloText(TPU_TEXT, 2).sent()


def test_a_loop_of_unknown_length_raises():
  with pytest.raises(ValueError, match="compares 0 counters instead of one"):
    collectives.HloText(TPU_TEXT.replace("direction=LT", "direction=NE")).sent()
