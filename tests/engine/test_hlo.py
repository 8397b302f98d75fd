"""Reading compiled programs: counts against unrolled programs and formulas, and forms that only accelerator compilers write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prfaas_jax.engine import hlo

LAYERS, WIDTH, TOKENS = 5, 64, 16


def module(fn, *args, **jit):
    return hlo.Module(jax.jit(fn, **jit).lower(*args).compile().as_text())


def stack(x, weights, unroll=1):
    """LAYERS times x -> tanh(x W), as a scan."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), ()), x, weights, unroll=unroll)[0]


X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
W = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)


def test_flops_of_a_scan_are_those_of_the_unrolled_program():
    expected = 2 * LAYERS * TOKENS * WIDTH * WIDTH
    assert hlo.dot_flops(module(stack, X, W)) == expected
    unrolled = jax.jit(functools.partial(stack, unroll=LAYERS)).lower(X, W).compile()
    assert hlo.dot_flops(hlo.Module(unrolled.as_text())) == expected
    # XLA's own count, right only without a loop, has the tanh on top.
    assert unrolled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.05)


def test_flops_can_be_left_out_by_name_and_branches_do_not_count():
    def fn(x, weights):
        with jax.named_scope("counted_elsewhere"):
            y = x @ weights[0]
        return jax.lax.cond(x[0, 0] > 0, lambda: y @ weights[1], lambda: y) @ weights[2]

    one = 2 * TOKENS * WIDTH * WIDTH
    compiled = module(fn, X, W)
    assert hlo.dot_flops(compiled) == 2 * one
    assert hlo.dot_flops(compiled, skip=lambda name: "counted_elsewhere" in name) == one


def test_collectives_are_counted_with_trip_counts_and_bytes():
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    shard = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    # The contracted axis is sharded: every layer ends in one all-reduce over "model".
    compiled = module(stack, X, W, in_shardings=(shard(None, "model"), shard(None, "model", None)), out_shardings=shard())
    looped = [c for c in hlo.collectives(compiled) if c.executed.trips == (LAYERS,)]
    assert {c.kind for c in looped} <= {"all-reduce", "all-gather", "collective-permute"}
    (reduce,) = [c for c in looped if c.kind == "all-reduce"]
    assert (reduce.group, reduce.payload, reduce.executed.times) == (4, 4 * TOKENS * WIDTH, LAYERS)
    assert reduce.link_bytes == 1.5 * reduce.payload  # 2 (n - 1) / n of it


def test_a_copied_pool_is_found_and_an_updated_one_is_not():
    pool = jax.ShapeDtypeStruct((4, 4096), jnp.float32)
    row = jax.ShapeDtypeStruct((4,), jnp.float32)
    size = 4 * 4096

    def in_place(pool, row):
        return pool.at[:, 7].set(row)

    def sliced(pool, row):  # a pool as scan input and output: what an engine must not do
        return jax.lax.scan(lambda c, p: (c, p.at[7].set(row[0])), 0, pool)[1]

    assert hlo.copies_of(module(in_place, pool, row, donate_argnums=0), size, "f32") == []
    assert hlo.copies_of(module(in_place, pool, row), size, "f32")  # not donated
    copying = module(sliced, pool, row, donate_argnums=0)
    assert hlo.copies_of(copying, size, "f32")
    assert hlo.copied_bytes(copying, {(size, "f32"), (7, "f32")}) >= 4 * size
    assert hlo.copied_bytes(copying, {(7, "f32")}) == 0


def test_the_loop_over_the_body_is_told_from_other_loops():
    def fn(x, weights):
        x = jax.lax.fori_loop(0, LAYERS, lambda i, x: x * 1.5, x)  # as long, but small
        return jax.lax.fori_loop(0, 2, lambda i, x: stack(x, weights), stack(x, weights))

    compiled = module(fn, X, W)
    body = hlo.longest_loop(compiled, LAYERS)
    times = {e.loops[:1] == (body,): e.times for e in compiled.executed() if e.instruction.opcode in ("dot", "custom-call")}
    assert times == {True: LAYERS, False: 2 * LAYERS}
    assert hlo.longest_loop(compiled, LAYERS + 1) is None


def test_a_pool_taken_into_fast_memory_and_back_is_no_copy():
    def copies(source, target):
        moved = f"(f32[8,64]{{1,0{target}}}, f32[8,64]{{1,0{source}}}, u32[]{{:S(2)}}) copy-start(%p)"
        entry = f"ENTRY %main (p: f32[8,64]) -> f32[8,64] {{\n  %p = f32[8,64]{{1,0{source}}} parameter(0)\n"
        return hlo.copies_of(hlo.Module(f"{entry}  ROOT %c = {moved}\n}}\n"), 8 * 64, "f32")

    fast = ":T(8,128)S(1)"
    assert copies("", fast) == copies(fast, "") == []
    assert copies("", ":T(8,128)") == copies(fast, fast) == ["copy-start c x1"]


# What a TPU compiler writes: layouts with brackets, no trip counts, matrix multiplications as convolutions, groups over mesh axes.
TPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[256,1024]) -> bf16[64,1024] {
  %input = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %reduced = bf16[256,1024]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = bf16[64,1024]{1,0:T(8,128)(2,1)} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={64,1024}
}

%windowed_dot_general_body_rs (p: (u32[], bf16[32,64])) -> (u32[], bf16[32,64]) {
  %p = (u32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %copied = u32[]{:T(128)} copy(%two)
  %next = u32[]{:T(128)} add(%n, %copied)
  %moving = (bf16[32,64]{1,0}, bf16[32,64]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %moved = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%moving)
  ROOT %both = (u32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %moved)
}

%condition (q: (u32[], bf16[32,64])) -> pred[] {
  %limit = u32[]{:T(128)} constant(7)
  %q = (u32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused (l: bf16[256,512,1], r: bf16[4,128,512]) -> bf16[256,4,128] {
  %l = bf16[256,512,1]{1,0,2:T(8,128)(2,1)} parameter(0)
  %r = bf16[4,128,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %heads = bf16[256,4,128]{0,2,1} convolution(%l, %r), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
}

ENTRY %main (x: bf16[256,1024], s: (u32[], bf16[32,64]), l: bf16[256,512,1], r: bf16[4,128,512]) -> bf16[256,4,128] {
  %x = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (u32[]{:T(128)}, /*index=1*/bf16[32,64]{1,0:T(8,128)(2,1)S(1)}) parameter(1)
  %l.1 = bf16[256,512,1]{1,0,2:T(8,128)(2,1)} parameter(2)
  %r.1 = bf16[4,128,512]{2,1,0:T(8,128)(2,1)} parameter(3)
  %scattered = bf16[64,1024]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %gathered = bf16[1024,1024]{1,0} all-gather(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
  %ring = (u32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)}) while(%s), condition=%condition, body=%windowed_dot_general_body_rs
  %q = f32[32,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jit(paged_attention)/pallas_call"}
  %hint = s32[32]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = bf16[256,4,128]{0,2,1} fusion(%l.1, %r.1), kind=kOutput, calls=%fused
}
"""


def test_what_tpu_compilers_write_is_understood():
    compiled = hlo.Module(TPU)
    seen = {(c.kind, c.group, c.payload, c.executed.times) for c in hlo.collectives(compiled)}
    ring = ("collective-permute", 2, 2 * 32 * 64, 4)  # counter 0, 2, 4, 6 below 7
    assert seen == {("reduce-scatter", 4, 2 * 256 * 1024, 1), ("all-gather", 4, 2 * 4 * 256 * 1024, 1), ring}
    assert [(kind, e.times) for kind, e in hlo.windowed(compiled)] == [("reduce-scatter", 1)]
    assert hlo.kernels(compiled) == {"paged_attention": 1}
    # [256, 512] x [4, 128, 512]: the window of 4 heads meets the one column that exists, not its padding.
    assert hlo.dot_flops(compiled) == 2 * 256 * 512 * 4 * 128


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        ('custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"lhs_contracting_dimensions":["1"]}', 2 * 8 * 16 * 32),
        ("dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 8 * 16 * 32),
    ],
)
def test_matrix_multiplications_in_every_spelling(line, flops):
    entry = "ENTRY %main (a: f32[8,16], b: f32[16,32]) -> f32[8,32] {\n"
    body = "  %a = f32[8,16]{1,0} parameter(0)\n  %b = f32[16,32]{1,0} parameter(1)\n"
    assert hlo.dot_flops(hlo.Module(f"{entry}{body}  ROOT %c = f32[8,32]{{1,0}} {line}\n}}\n")) == flops


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.Module("HloModule nothing")
