"""HBM and collective bytes, parsed from a small HLO text written by hand."""

from bis_jax.compilation import hlo

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%condition (carry: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28), metadata={op_name="while"}
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}
  %hidden = f32[4,8]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused
  %start = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %done = f32[4,8]{1,0} collective-permute-done(%start)
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%i, %done)
}

%fused (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %twice = f32[4,8]{1,0} add(%x, %x)
}

%inside (x: f32[16]) -> f32[4] {
  %x = f32[16]{0} parameter(0)
  %all-reduce.2 = f32[16]{0} all-reduce(%x), to_apply=%add
  ROOT %slice = f32[4]{0} slice(%all-reduce.2), slice={[0:4]}
}

%update (x: f32[64], y: f32[4]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  ROOT %dynamic-update-slice.1 = f32[64]{0} dynamic-update-slice(%x, %y, %i)
}

ENTRY %main (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %loop = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body
  %scattered = f32[4]{0} fusion(%p), kind=kCustom, calls=%inside
  %in_place = f32[64]{0} fusion(%p), kind=kLoop, calls=%update
  %pair = (f32[2]{0}, /*index=1*/f32[2]{0}) reduce-scatter(%p, %p), to_apply=%add
  ROOT %copy = f32[4]{0} copy(%scattered)
}
"""


def test_collectives_in_loops_count_once_per_trip():
  assert hlo.collectives(PROGRAM) == {
    "all-gather": (28, 28 * 8 * 8 * 2),
    "all-reduce": (1, 16 * 4),  # inside a fusion
    "reduce-scatter": (1, 2 * 16 * 4),  # its operands
    "collective-permute": (28, 28 * 4 * 8 * 4),  # not its counters, and not twice
  }


def test_results_in_hbm_are_written_and_read():
  loop = 28 * (8 * 8 * 2 + 4 * 8 * 4)  # the hidden one stays in vector memory
  once = 16 * 4 + 4 * 4 + 4 * 4 + 4 * 4  # sum, its slice, the pair, the copy; no update in place
  assert hlo.hbm_bytes(PROGRAM) == 2 * (loop + once)
