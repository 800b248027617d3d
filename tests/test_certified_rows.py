"""Every row of the table between slices and nodes that are not there, where their compilers are installed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.certify import absent_mesh, certify, declared
from gradcomp_jax.exchange.collectives import TILE
from gradcomp_jax.placing import global_init
from gradcomp_jax.testing.laws import possible
from tests.table import ROWS
from tests.test_across import PADDING, SOME
from tests.test_certify import gpu, tpu

PARAMS = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in {
        "rows": (512, 1024),
        "conv": (3, 3, 128, 256),
        "odd": (33, 24),
        "vector": (2048,),
        "gain": (),
    }.items()
}
# All between two slices, one of each algorithm elsewhere.
TARGETS = {("v5e:2x4", 2): (tpu, ROWS), ("v5e:2x4", 4): (tpu, SOME), ("h100:2x8", 1): (gpu, SOME)}
each_row = pytest.mark.parametrize(
    ("target", "slices", "row"),
    [
        pytest.param(*target, row, marks=installed, id=f"{target[0]}-{target[1]}-{row.id}")
        for target, (installed, rows) in TARGETS.items()
        for row in rows
    ],
)


def update_of(tx, mesh):
    """A jitted update of gradients, each device its own, and the shapes of its arguments."""
    state = jax.eval_shape(functools.partial(global_init, tx, mesh), PARAMS)
    each, specs = P(mesh.axis_names), gc.state_specs(tx, PARAMS)

    def worker(grads, state):
        updates, after = tx.update(jax.tree.map(lambda x: x[0], grads), gc.local_state(state))
        return updates, gc.global_state(after)

    step = jax.shard_map(worker, mesh=mesh, in_specs=(each, specs), out_specs=(P(), specs))
    lies = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    grads = {path: lies(jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype), each) for path, x in PARAMS.items()}
    return jax.jit(step), (grads, jax.tree.map(lies, state, specs))


@each_row
def test_a_chip_sends_its_share_and_what_is_counted(target, slices, row):
    mesh = absent_mesh(target, slices)
    report = certify(*update_of(gc.across(row.make()), mesh), mesh)
    assert not report.findings
    for link, counted in report.declared.items():
        of_link = [x.collective for x in report.sent if x.link == link]
        assert min(abs(counted - sent) for sent in possible(of_link, lambda c: c.ring_bytes, 0)) < 1
    if not report.declared:  # told by the state alone, which emulated devices have
        return
    by_itself = Mesh(mesh.devices[:, 0], "data")
    step, args = update_of(row.make(), by_itself)
    alone, chips = declared(step.trace(*args), args)["between"], mesh.shape["local"]
    messages = sum(x.link == "between" for x in report.sent)
    filled = PADDING.get(row.id, 0) * alone / chips + (4 * TILE * messages if slices > 1 else 0)
    assert report.declared["between"] <= 1.05 * alone / chips + filled + 4
