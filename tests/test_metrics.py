"""Counting bits, and reading collectives out of HLO."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.exchange.bits import add_bits, no_bits, total_bits


@hypothesis.given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_counts_do_not_wrap(steps):
    count = no_bits()
    for bits in steps:
        count = add_bits(count, bits)
    assert gc.wire_bits(count) == (steps[-1], sum(steps))


@hypothesis.given(st.lists(st.integers(0, 2**40), min_size=1, max_size=9), st.sampled_from([1, 2**17]))
def test_many_counts_add_up(counts, times):
    pairs = jnp.array([divmod(bits, 2**32) for bits in counts], jnp.uint32)
    high, low = total_bits(jnp.tile(pairs, (times, 1))).tolist()
    assert high << 32 | low == times * sum(counts)


def test_counts_pass_through_jit_and_carry():
    count = no_bits()
    step = jax.jit(lambda count: add_bits(count, 2**33 - 1))
    for _ in range(5):
        count = step(count)
    assert gc.wire_bits(count) == (2**33 - 1, 5 * (2**33 - 1))


def compiled(f):
    mesh = gc.make_mesh(4)
    program = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
    return program.lower(jnp.ones((16, 8))).compile()


def test_every_kind_of_collective():
    def f(x):  # [4, 8] on each worker
        a = lax.psum(x, "data")
        b = lax.all_gather(x.astype(jnp.uint8), "data").sum(0).astype(jnp.float32)
        c = lax.all_to_all(x * 2, "data", 0, 0)
        d = lax.ppermute(x * 3, "data", [(i, (i + 1) % 4) for i in range(4)])
        e = lax.psum_scatter(x * 4, "data")
        return a + b + c + d + e[None]

    got = {c.kind: (c.dtype, c.operand_bytes, c.workers, c.ring_bytes) for c in gc.collective_bytes(compiled(f))}
    assert got == {
        "all-reduce": ("f32", 128, 4, 192),
        "all-gather": ("u8", 32, 4, 96),
        "all-to-all": ("f32", 128, 4, 96),
        "collective-permute": ("f32", 128, 4, 128),
        "reduce-scatter": ("f32", 128, 4, 96),
    }


def test_branches_are_told_apart():
    def f(x):
        return lax.switch(
            jnp.int32(x[0, 0]) % 3,
            [lambda x: lax.psum(x, "data"), lambda x: lax.psum(x[:2], "data")[:1] + x, lambda x: x],
            x,
        )

    def g(x):
        return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x[:1], "data") + x, lambda x: x, x) + lax.pmax(x, "data")

    bytes_of = {c.branch.rsplit("/", 1)[1]: c.operand_bytes for c in gc.collective_bytes(compiled(f))}
    assert bytes_of == {"0": 128, "1": 64}
    inside, outside = sorted(gc.collective_bytes(compiled(g)), key=lambda c: c.operand_bytes)
    assert inside.branch.endswith("/1")
    assert (inside.operand_bytes, outside.operand_bytes, outside.branch) == (32, 128, "")


def test_loops_count_each_trip():
    def f(x):
        return lax.fori_loop(0, 7, lambda i, x: lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]) + 1, x)

    (c,) = gc.collective_bytes(compiled(f))
    assert c.operand_bytes == 7 * 128

    def endless(x):
        return lax.while_loop(lambda x: x.sum() < 100, lambda x: lax.psum(x, "data"), x)

    with pytest.raises(ValueError, match="loop of unknown length"):
        gc.collective_bytes(compiled(endless))

    def tested_by_all(x):
        return lax.while_loop(lambda x: lax.psum(x, "data").sum() < 100, lambda x: x + 1, x)

    with pytest.raises(ValueError, match="loop of unknown length"):
        gc.collective_bytes(compiled(tested_by_all))


def test_groups_along_one_axis_of_the_mesh():
    mesh = gc.make_mesh({"node": 2, "local": 4})
    f = jax.shard_map(
        lambda x: lax.psum(x, "node") + lax.psum(x * 2, "local"),
        mesh=mesh,
        in_specs=P(("node", "local")),
        out_specs=P(("node", "local")),
        check_vma=False,
    )
    got = gc.collective_bytes(jax.jit(f).lower(jnp.ones(16)).compile())
    assert sorted(c.workers for c in got) == [2, 4]


# As GPU and TPU compilers print it: asynchronous pairs, iota groups, an operand of two types.
ASYNC = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

ENTRY %main (p0: f32[100], p1: u8[64]) -> (f32[100], u8[512]) {
  %p0 = f32[100]{0} parameter(0)
  %p1 = u8[64]{0} parameter(1)
  %all-reduce-start = f32[100]{0} all-reduce-start(%p0), replica_groups=[1,8]<=[8], to_apply=%add
  %all-gather-start = (u8[64]{0}, u8[512]{0}) all-gather-start(%p1), replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-done = u8[512]{0} all-gather-done(%all-gather-start)
  %all-reduce-done = f32[100]{0} all-reduce-done(%all-reduce-start)
  ROOT %tuple = (f32[100]{0}, u8[512]{0}) tuple(%all-reduce-done, %all-gather-done)
}
"""


def test_asynchronous_pairs_count_once():
    got = gc.collective_bytes(ASYNC)
    assert got == [
        gc.Collective("all-reduce", "f32", 400, 8, "", 700.0, groups=(tuple(range(8)),), name="all-reduce-start"),
        gc.Collective("all-gather", "u8", 64, 8, "", 448, groups=(tuple(range(8)),), name="all-gather-start"),
    ]


@pytest.mark.parametrize(
    ("groups", "workers"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("{}", 8),
        ("mesh['data'=2,'m'=4] {'data'}", 2),
        ("mesh['data'=2,'m'=4] {'data','m'}", 8),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([2,4]T(1,0)) {'axis_1'}", 2),
    ],
)
def test_groups_in_every_notation(groups, workers):
    got = gc.collective_bytes(ASYNC.replace("[1,8]<=[8]", groups))
    assert [c.workers for c in got] == [workers, workers]


@pytest.mark.parametrize("operand", ["%p0", "f32[100]{0} %p0", "f32[100]{0:T(128)} %p0", "p0"])
def test_operands_in_every_notation(operand):
    got = gc.collective_bytes(ASYNC.replace("all-reduce-start(%p0)", f"all-reduce-start({operand})"))
    assert got[0].operand_bytes == 400


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(%p0)", "(%gone)", "cannot read the operands"),
        ("[1,8]<=[8]", "<@mesh>", "cannot read replica_groups"),
        ("all-gather-start(", "collective-broadcast(", "bytes are not known"),
        ("ENTRY", "", "not the text of an HLO module"),
    ],
)
def test_what_cannot_be_read_is_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        gc.collective_bytes(ASYNC.replace(old, new))


def test_lowered_text_is_refused():
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        gc.collective_bytes(jax.jit(lambda x: x + 1).lower(jnp.ones(3)).as_text())


# What XLA writes for TPUs: two sends to other slices, and an all-gather that stands in each fusion of a chain.
OF_SLICES = """HloModule step, is_scheduled=true, num_partitions=8

%begins (p: f32[4]) -> (f32[16]) {
  %p = f32[4]{0} parameter(0)
  %all-gather.1 = f32[16]{0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, frontend_attributes={chain_id="0"}
  ROOT %custom-call = (f32[16]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: f32[4]) -> (f32[16]) {
  %p.2 = f32[4]{0} parameter(0)
  %all-gather.2 = f32[16]{0} all-gather(%p.2), replica_groups={{0,1,2,3},{4,5,6,7}}, frontend_attributes={chain_id="0"}
  ROOT %tuple = (f32[16]{0}) tuple(%all-gather.2)
}

ENTRY %main (p: f32[4], q: u8[3,8]) -> f32[16] {
  %x = f32[4]{0} parameter(0)
  %q = u8[3,8]{1,0} parameter(1)
  %start = (f32[16]{0}) fusion(%x), kind=kCustom, calls=%begins
  %more = (f32[16]{0}) fusion(%x), kind=kCustom, calls=%goes_on
  %token = token[] after-all()
  %send = (f32[4]{0}, u32[], token[]) send(%x, %token), frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), frontend_attributes={h="xla_megascale_runtime"}
  %send.1 = (u8[3,8]{1,0}, u32[], token[]) send(%q, %token), frontend_attributes={_xla_megascale_target={{100000,200000,300000},{100001,200001,300001}},_xla_megascale_transfer_type="ALL_TO_ALL"}
  %recv = (u8[3,8]{1,0}, u32[], token[]) recv(%token), frontend_attributes={h="xla_megascale_runtime"}
  ROOT %got = f32[16]{0} get-tuple-element(%start), index=0
}
"""  # noqa: E501


def test_what_goes_between_the_slices_of_a_tpu():
    inside, total, codes = gc.collective_bytes(OF_SLICES)
    assert (inside.kind, inside.workers, inside.ring_bytes, inside.crosses(4)) == ("all-gather", 4, 48, False)
    assert (total.kind, total.dtype, total.workers, total.ring_bytes, total.crosses(4)) == (
        "all-reduce",
        "f32",
        2,
        16,
        True,
    )
    assert (codes.kind, codes.dtype, codes.workers, codes.ring_bytes) == ("all-to-all", "u8", 3, 16)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['node'=2, 'local'=2] {'node'}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3),)),
    ],
)
def test_groups_are_read_as_they_are_written(written, groups):
    text = f"""HloModule step, num_partitions=4

ENTRY %main (p: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %all-reduce = f32[4]{{0}} all-reduce(%x), replica_groups={written}, to_apply=%add
}}
"""
    (found,) = gc.collective_bytes(text)
    assert found.groups == groups
    assert found.crosses(2) == (len(groups) == 1 or groups[0] == (0, 2))


# A ring between the slices of a TPU, whose compiler does not say how often a loop runs.
RING_OF_SLICES = """HloModule step, is_scheduled=true, num_partitions=8

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %one = s32[]{:T(128)} constant(1)
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %part = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  %token = token[] after-all()
  %send = (f32[4]{0:T(128)}, u32[], token[]) send(%part, %token), frontend_attributes={_xla_megascale_target={{100000->200000},{200000->100000}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %copy = s32[]{:T(128)S(6)} copy(%i)
  %add = s32[]{:T(128)} add(%copy, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%add, %part)
}

%test (p: (s32[], f32[4])) -> pred[] {
  %end = s32[]{:T(128)} constant(3)
  %p.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %begin = s32[]{:T(128)} copy(%zero)
  %tuple = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%begin, %x)
  %while = (s32[]{:T(128)}, f32[4]{0:T(128)}) while(%tuple), condition=%test, body=%body
  ROOT %got = f32[4]{0:T(128)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_a_loop_whose_length_is_read_from_its_test():
    (passed,) = gc.collective_bytes(RING_OF_SLICES)
    assert (passed.kind, passed.operand_bytes, passed.ring_bytes) == ("collective-permute", 3 * 16, 3 * 16)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("constant(0)", "constant(1)"),
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)"),
        ("direction=LT", "direction=LE"),
        ("add(%copy", "multiply(%copy"),
        ("%copy = s32[]{:T(128)S(6)} copy(%i)", "%copy = s32[]{:T(128)S(6)} negate(%i)"),
        ("%end = s32[]{:T(128)} constant(3)", "%end = s32[]{:T(128)} parameter(1)"),
        ("%begin = s32[]{:T(128)} copy(%zero)", "%begin = s32[]{:T(128)} parameter(1)"),
    ],
)
def test_a_loop_that_counts_otherwise(old, new):
    with pytest.raises(ValueError, match="loop of unknown length"):
        gc.collective_bytes(RING_OF_SLICES.replace(old, new))
