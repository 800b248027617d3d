"""The laws that every codec obeys, over the table of codecs."""

import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from experiments.models import resnet18_shapes
from gradcomp_jax.compressor import flatten
from tests import trees
from tests.contexts import CONTEXTS, every_context, run
from tests.table import EACH, ROWS

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
each_codec = pytest.mark.parametrize("row", EACH, ids=lambda row: row.id)
STEPS, WORKERS = 8, 4
# Compressors are compared by identity in the cache of compiled programs, so each row is made once.
TX = {row.id: row.make() for row in ROWS}
GRADS = trees.noise(trees.MIXED, 0, (STEPS, WORKERS))


every_phase = pytest.mark.parametrize(
    ("row", "step"), [pytest.param(row, step, id=f"{row.id}-{step}") for row in ROWS for step in row.phases]
)
TWO = {"a": (40, 24), "b": (72, 16)}


def state_at(row, step):
    """The codec's state after some steps of noise on TWO."""
    if step == 0:
        return TX[row.id].codec.init(trees.zeros(TWO))
    states = run(TX[row.id], trees.noise(TWO, 12, (STEPS, WORKERS)), "vmap").states
    return jax.tree.map(lambda x: jnp.asarray(x[step - 1, 0]), states.codec)


def last(tree):
    return jax.tree.map(lambda x: x[-1], tree)


def residual_mean(state, like):
    """The mean of the residuals [workers, ...] after a step, as a tree like the updates, zero where dense."""
    leaves, treedef = flatten(like)
    owed = [state.residual.value.get(path, np.zeros((1, 1))).mean(0) for path in leaves]
    return jax.tree.unflatten(treedef, owed)


def assert_conserved(grads, got, tolerance):
    """Sum of applied + mean of residuals == sum of mean gradients, over steps that were not skipped."""
    applied = jax.tree.map(lambda x: x.astype(np.float64).sum(0)[0], got.updates)
    owed = residual_mean(last(got.states), jax.tree.map(lambda x: x[0, 0], grads))
    given = jax.tree.map(lambda x: x.astype(np.float64).mean(1).sum(0), grads)
    chex.assert_trees_all_close(jax.tree.map(np.add, applied, owed), given, atol=tolerance, rtol=0)


class TestConservation:
    """Law 1."""

    @every_phase
    def test_own_averages_to_mean(self, row, step):
        codec = TX[row.id].codec
        grads = trees.noise(TWO, 1, (WORKERS,))
        state = state_at(row, step)

        def worker(x):
            return codec.exchange(x, state, "data")._replace(bits=0)

        got = jax.jit(jax.vmap(worker, axis_name="data"))(grads)
        own = jax.tree.map(lambda x: np.asarray(x, np.float64).mean(0), got.own)
        chex.assert_trees_all_close(own, jax.tree.map(lambda x: x[0], got.mean), atol=1e-5, rtol=0)

    @every_context
    @every_row
    def test_applied_and_residuals_hold_all_gradients(self, row, context):
        got = run(TX[row.id], GRADS, context)
        has_residual = bool(got.states.residual.value)
        if has_residual or row.id == "none":
            assert_conserved(GRADS, got, 2e-5 * STEPS)

    @hypothesis.given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1.0, 1e6]))
    @each_codec
    def test_whatever_the_values(self, row, seed, scale):
        grads = jax.tree.map(lambda x: np.float32(scale) * x, trees.noise(trees.MIXED, seed, (STEPS, WORKERS)))
        got = run(TX[row.id], grads, "vmap")
        if got.states.residual.value or row.id == "none":
            assert_conserved(grads, got, 5e-5 * STEPS * scale)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize("row", [row for row in EACH if "ef" in row.id or "powersgd" in row.id], ids=lambda r: r.id)
    def test_rounding_to_16_bits_is_owed_too(self, row, dtype):
        grads = jax.tree.map(lambda x: np.asarray(x, dtype), trees.noise(trees.MATRICES, 11, (100, 2)))
        got = run(TX[row.id], grads, "checked")
        assert jax.tree.leaves(got.updates)[0].dtype == dtype
        assert_conserved(grads, got, 1e-3)

    def test_float16_saturates_and_owes_the_rest(self):
        grads = {"w": np.full((40, 2, 40, 24), 20_000, np.float16)}
        grads["w"][:, :, ::2] *= -1
        got = run(TX["powersgd-1"], grads, "vmap")
        assert np.isfinite(got.updates["w"]).all()
        np.testing.assert_array_equal(got.states.skipped, 0)
        assert_conserved(grads, got, 2.0)


class TestAgreement:
    """Law 2."""

    @every_context
    @every_row
    def test_all_workers_apply_the_same_bits(self, row, context):
        got = run(TX[row.id], GRADS, context)
        replicated = (got.updates, got.states._replace(residual=None))
        for leaf in jax.tree.leaves(replicated):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:, :1], leaf.shape))

    @every_row
    def test_residuals_differ(self, row):
        for leaf in jax.tree.leaves(run(TX[row.id], GRADS, "checked").states.residual):
            assert row.id == "none" or np.abs(leaf[-1, 0] - leaf[-1, 1]).max() > 1e-3

    def test_qsgd_rounds_by_each_workers_own_numbers(self):
        same = jax.tree.map(lambda x: np.broadcast_to(x[:, :1], x.shape), GRADS)
        got = run(TX["qsgd-4-ef"], same, "checked")
        for leaf in jax.tree.leaves(got.states.residual):
            assert np.abs(leaf[-1, 0] - leaf[-1, 1]).max() > 1e-3

    def test_qsgd_rounds_by_other_numbers_in_every_step(self):
        same = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), GRADS)
        updates = run(TX["qsgd-4"], same, "vmap").updates["conv"]
        assert all((updates[i] != updates[j]).any() for i in range(STEPS) for j in range(i))


class TestLinearity:
    """Law 3."""

    @pytest.mark.parametrize("row", [row for row in ROWS if row.linear], ids=lambda row: row.id)
    def test_many_workers_equal_one_with_the_mean(self, row):
        with jax.enable_x64(True):
            tx = row.make()
            grads = trees.noise(trees.MATRICES, 2, (12, WORKERS), np.float64)
            mean = jax.tree.map(lambda x: x.mean(1, keepdims=True), grads)
            many, one = run(tx, grads, "vmap"), run(tx, mean, "vmap")
            assert jax.tree.leaves(many.updates)[0].dtype == np.float64
            first = jax.tree.map(lambda x: x[:, :1], many.updates)
            chex.assert_trees_all_close(first, one.updates, atol=1e-12, rtol=0)


class TestContextsAgree:
    """Law 4, in one process."""

    @every_row
    def test_numbers_do_not_depend_on_the_context(self, row):
        reference = run(TX[row.id], GRADS, "vmap")
        for context in CONTEXTS[1:]:
            got = run(TX[row.id], GRADS, context)
            # Some columns of PowerSGD's Q exceed 2, hence the relative part.
            chex.assert_trees_all_close(got, reference, atol=2e-5, rtol=1e-5)
            chex.assert_trees_all_equal(got.states.wire, reference.states.wire)

    @pytest.mark.parametrize("workers", [1, 3, 8])
    @every_row
    def test_any_number_of_workers(self, row, workers):
        self.any_number(row, workers, "vmap")

    @each_codec
    def test_two_workers(self, row):
        self.any_number(row, 2, "checked")

    def any_number(self, row, workers, context):
        grads = trees.noise(trees.MIXED, 3, (3, workers))
        got = run(TX[row.id], grads, context)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
        if workers == 1:
            assert gc.wire_bits(last(got.states)) == (0, 0)
        if got.states.residual.value:
            assert_conserved(grads, got, 1e-4)


def hlo_of(tx, shapes, workers):
    """The compiled program that holds the transformation alone, in its checked shard_map."""
    mesh = gc.make_mesh(workers)
    params = trees.zeros(shapes)
    specs = gc.state_specs(tx, params)

    def worker(grads, state):
        updates, state = tx.update(jax.tree.map(lambda x: x[0], grads), gc.local_state(state))
        return updates, gc.global_state(state)

    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P(), specs)))
    grads = jax.tree.map(lambda x: jnp.ones((workers, *x.shape)), params)
    compiled = step.lower(grads, gc.init(tx, params, mesh)).compile()

    def states():
        state = gc.init(tx, params, mesh)
        for _ in range(STEPS):
            _, state = compiled(grads, state)
            yield state

    return compiled, states


def possible_bytes(collectives, prefix=()):
    """What a worker may send: by each choice of a branch in each conditional below `prefix`, (name, index, ...)."""
    here = [c for c in collectives if tuple(filter(None, c.branch.split("/"))) == prefix]
    below = {}
    for c in collectives:
        branch = tuple(filter(None, c.branch.split("/")))
        if len(branch) > len(prefix) and branch[: len(prefix)] == prefix:
            below.setdefault(branch[len(prefix)], set()).add(branch[len(prefix) + 1])
    totals = {sum(c.ring_bytes for c in here)}
    for name, branches in below.items():
        choices = set() if len(branches) > 1 else {0.0}  # a single one that sends is there to be left out
        for index in branches:
            choices |= possible_bytes(collectives, (*prefix, name, index))
        totals = {total + choice for total in totals for choice in choices}
    return totals


class TestBitsAreTrue:
    """Law 5."""

    @pytest.mark.parametrize("workers", [2, 8])
    @each_codec
    def test_declared_bits_are_those_of_the_compiled_collectives(self, row, workers):
        compiled, states = hlo_of(TX[row.id], trees.MIXED, workers)
        possible = {8 * sent for sent in possible_bytes(gc.collective_bytes(compiled))}
        declared = [gc.wire_bits(state) for state in states()]
        assert {bits.last for bits in declared} <= possible
        assert [bits.total for bits in declared] == list(itertools.accumulate(bits.last for bits in declared))
        # In each phase the branch taken is another.
        assert len({declared[step].last for step in row.phases}) == len({bits.last for bits in declared})
        assert len({bits.last for bits in declared}) == min(len(row.phases), 3)

    @pytest.mark.parametrize("row", [row for row in ROWS if row not in EACH], ids=lambda row: row.id)
    def test_in_other_settings_too(self, row):
        self.test_declared_bits_are_those_of_the_compiled_collectives(row, 4)

    @every_row
    def test_totals_add_up(self, row):
        counts = run(TX[row.id], GRADS, "vmap").states.wire
        bits = [gc.wire_bits(jax.tree.map(lambda x, t=t: x[t], counts)) for t in range(STEPS)]
        assert [b.total for b in bits] == list(itertools.accumulate(b.last for b in bits))


class TestStateIsStable:
    """Law 6."""

    @every_row
    def test_types_shapes_and_structure_do_not_change(self, row):
        params = trees.zeros(trees.MIXED)
        state = gc.init(TX[row.id], params, 1)
        after = last(run(TX[row.id], trees.noise(trees.MIXED, 4, (2, 1)), "vmap").states)
        chex.assert_trees_all_equal_structs(state, after)
        local = jax.eval_shape(TX[row.id].init, params)
        one = jax.tree.map(lambda x: x[0], after)
        chex.assert_trees_all_equal_shapes_and_dtypes(local, one)

    @each_codec
    def test_an_empty_tree(self, row):
        tx = TX[row.id]
        for tree in ({}, {"nothing": None, "more": []}):
            updates, state = jax.vmap(lambda _, tree=tree: tx.update(tree, tx.init(tree)), axis_name="data")(
                jnp.zeros(3)
            )
            chex.assert_trees_all_equal_structs(updates, tree)
            assert gc.wire_bits(state) == (0, 0)

    @each_codec
    def test_donation_and_orbax(self, row, tmp_path):
        mesh = gc.make_mesh(4)
        tx = optax.chain(TX[row.id], optax.sgd(0.1, momentum=0.9))
        params = jax.tree.map(lambda x: x + 0.5, trees.zeros(trees.MATRICES))
        batch = trees.noise(trees.MATRICES, 5, (8,))

        def loss(params, batch):
            fit = jax.tree.map(lambda p, b: jnp.mean((p[None] - b) ** 2), params, batch)
            return sum(jax.tree.leaves(fit))

        step = gc.train_step(loss, tx, mesh, donate=True)
        params, state, _ = step(params, gc.init(tx, params, mesh), batch)
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "state", (params, state))
            saver.wait_until_finished()
            restored = saver.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state)))
        chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get((params, state)))
        chex.assert_trees_all_equal(jax.device_get(step(*restored, batch)), jax.device_get(step(params, state, batch)))


# The first step, and one of every phase of every codec.
BAD = [
    (value, step, worker)
    for value, step in ((np.nan, 0), (np.inf, 2), (np.nan, 3), (-np.inf, 4), (np.nan, 5))
    for worker in (1, slice(None))
]


class TestNothingPoisons:
    """Law 7."""

    @pytest.mark.parametrize(("value", "step", "who"), BAD, ids=str)
    @pytest.mark.parametrize("leaf", ["kernel", "bias"])
    @every_row
    def test_a_step_that_is_not_finite_never_happened(self, row, leaf, value, step, who):
        """The updates are zero, and all that follows is as if the step were not there."""
        good = trees.noise(trees.MIXED, 6, (STEPS, WORKERS))
        bad = jax.tree.map(np.copy, good)
        bad["dense"][leaf][step, who].reshape(-1, 24)[..., 7] = value
        with_bad = run(TX[row.id], bad, "vmap")
        assert not any(x[step].any() for x in jax.tree.leaves(with_bad.updates))
        np.testing.assert_array_equal(with_bad.states.skipped[-1], 1)

        rest = np.delete(np.arange(STEPS), step)
        # Short of one step, the other run repeats its last gradient; that step is not compared.
        without = run(TX[row.id], jax.tree.map(lambda x: x[[*rest, rest[-1]]], good), "vmap")
        kept = np.arange(STEPS - 1)
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x: x[rest], (with_bad.updates, with_bad.states._replace(wire=None, skipped=None))),
            jax.tree.map(lambda x: x[kept], (without.updates, without.states._replace(wire=None, skipped=None))),
        )

    @every_context
    @each_codec
    def test_in_every_context(self, row, context):
        bad = jax.tree.map(np.copy, GRADS)
        bad["conv"][3, 2, 1, 1, 3, 5] = np.nan
        got = run(TX[row.id], bad, context)
        np.testing.assert_array_equal(got.states.skipped, [[i >= 3] * WORKERS for i in range(STEPS)])
        assert not any(x[3].any() for x in jax.tree.leaves(got.updates))
        before, after = (jax.tree.map(lambda x, t=t: x[t], got.states) for t in (2, 3))
        chex.assert_trees_all_equal(after._replace(skipped=None, wire=None), before._replace(skipped=None, wire=None))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        sent = [gc.wire_bits(jax.tree.map(lambda x, t=t: x[t], got.states)) for t in range(4)]
        assert sent[3].total == sum(bits.last for bits in sent)  # what was skipped was sent
        assert sent[3].last > 0

    @every_row
    def test_zero_gradients(self, row):
        grads = jax.tree.map(np.copy, GRADS)
        for leaf in jax.tree.leaves(grads):
            leaf[:2] = 0
        got = run(TX[row.id], grads, "vmap")
        assert not any(x[:2].any() for x in jax.tree.leaves(got.updates))
        assert all(np.isfinite(x).all() and x[2:].any() for x in jax.tree.leaves(got.updates))
        np.testing.assert_array_equal(got.states.skipped, 0)

    @each_codec
    def test_tiny_leaves(self, row):
        tx = row.make(allow_dense=True)
        grads = trees.noise({"scalar": (), "one": (1,), "dot": (1, 1), "row": (1, 5), "column": (5, 1)}, 7, (2, 3))
        got = run(tx, grads, "vmap")
        mean = jax.tree.map(lambda x: x.mean(1), grads)
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[:, 0], got.updates), mean, atol=1e-6)

    @pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30])
    @each_codec
    def test_extreme_magnitudes(self, row, magnitude):
        got = run(TX[row.id], jax.tree.map(lambda x: x * np.float32(magnitude), GRADS), "vmap")
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


class TestBounded:
    """Law 8."""

    @pytest.mark.parametrize(
        "row", [row for row in ROWS if TX[row.id].init(trees.zeros(trees.ONE)).residual.value], ids=lambda row: row.id
    )
    def test_residual_stays_bounded(self, row):
        grads = trees.noise(trees.ONE, 8, (400, 2))
        (residual,) = jax.tree.leaves(run(TX[row.id], grads, "vmap").states.residual)
        norms = np.linalg.norm(residual.reshape(400, -1), axis=1)
        assert_conserved(grads, run(TX[row.id], grads, "vmap"), 1e-3)
        early, late = norms[100:200].mean(), norms[300:].mean()
        assert late < 1.1 * early + 1e-6, (early, late)
        assert norms.max() < 12 * np.linalg.norm(grads["only"][0])


class Recorder:
    """Stands in the place of jax's collectives and keeps what they are given.

    Of a conditional it has one branch run, so that what is kept is what is sent: that of its predicate where
    the value is known, else that of `taken`, else (of a switch) the first.
    """

    def __init__(self, monkeypatch, taken=()):
        self.operands = []
        for name in ("psum", "pmean", "pmax", "all_gather", "all_to_all", "ppermute", "psum_scatter"):
            monkeypatch.setattr(lax, name, self._recording(getattr(lax, name)))
        taken, cond = iter(taken), lax.cond

        def one_of_two(known, yes, no):
            predicate = next(taken, None) if isinstance(known, jax.core.Tracer) else known
            if predicate is None:  # holds no collectives
                return cond(known, yes, no)
            return yes() if predicate else no()

        def one_of_many(index, branches):
            return branches[0 if isinstance(index, jax.core.Tracer) else int(index)]()

        monkeypatch.setattr(lax, "cond", one_of_two)
        monkeypatch.setattr(lax, "switch", one_of_many)

    def _recording(self, collective):
        def record(operand, axis_name, **kwargs):
            self.operands.append(operand)
            return collective(operand, axis_name, **kwargs)

        return record


class TestOnlyTheWireSpeaks:
    """Law 9."""

    @every_phase
    def test_mean_is_rebuilt_from_the_wire_alone(self, row, step, monkeypatch):
        state = state_at(row, step)
        recorder = Recorder(monkeypatch, row.phases[step])
        codec = TX[row.id].codec
        grads = trees.noise(TWO, 9, (WORKERS,))

        def worker(x):
            return codec.exchange(x, state, "data").mean, list(recorder.operands)

        program = jax.vmap(worker, axis_name="data")
        # Which rung a leaf is on is known outside jit only.
        mean, operands = (program if getattr(state, "rung", None) else jax.jit(program))(grads)
        rebuilt = row.rebuild(jax.device_get(operands), state, TWO)
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], mean), rebuilt, atol=2e-5, rtol=0)

    @every_phase
    def test_no_more_than_the_papers_formula_on_resnet18(self, row, step, monkeypatch):
        tx = row.make()
        shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: trees.zeros(resnet18_shapes())))]
        vectors = [shape for shape in shapes if len(shape) < 2]
        matrices = [shape for shape in shapes if len(shape) >= 2]
        recorder = Recorder(monkeypatch, row.phases[step])

        def worker(_):
            grads = trees.zeros(resnet18_shapes())
            return tx.update(grads, tx.init(grads))

        jax.eval_shape(jax.vmap(worker, axis_name="data"), jnp.zeros(4))
        sent = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(recorder.operands))
        assert sent <= row.payload(matrices, step) + sum(4 * shape[0] for shape in vectors)
