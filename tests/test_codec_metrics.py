"""What `measured` keeps and `metrics` tells, against numpy, over the table of codecs."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gcj
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.norms import norm, of_terms
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import map_state, run
from tests import problem, slices
from tests.marks import every_context
from tests.table import BY_ID, ROWS
from tests.test_refusals import refuses

STEPS, WORKERS = 8, 4
GRADS = trees.noise(trees.MIXED, 1, (STEPS, WORKERS))
LAST = jax.tree.map(lambda x: x[-1], GRADS)
# One leaf and two workers, for what is asked of every row.
FEW = trees.noise(trees.ONE, 1, (STEPS, 2))
FIGURES = gcj.LeafMetrics._fields


@functools.cache
def measured_run(id):
    return run(gcj.measured(BY_ID[id].make()), GRADS, "vmap")


@functools.cache
def short_run(id, context="vmap"):
    return run(gcj.measured(BY_ID[id].make()), FEW, context)


def at(tree, step):
    return jax.tree.map(lambda x: x[step], tree)


def norms_of(xs):
    """[steps, workers] of [steps, workers, ...]."""
    return np.linalg.norm(xs.astype(np.float64).reshape(*xs.shape[:2], -1), axis=-1)


def before(xs):
    """What there was before each step, which begins with zeros."""
    return np.concatenate([np.zeros_like(xs[:1]), xs[:-1]])


def expected(feedback, gradient, memory):
    """[steps, workers, 3] by hand, of a codec with feedback, whose memory after each step is given."""
    if isinstance(feedback, gcj.EF21):
        given, lost = gradient - before(memory), gradient - memory
    else:
        given, lost = gradient + feedback.decay * before(memory), memory
    return np.stack([norms_of(x) for x in (gradient, given, lost)], axis=-1)


def of_workers(*norms):
    """All of a figure's norms as one."""
    return math.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in norms))


class TestEveryCodec:
    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
    def test_it_changes_nothing_and_is_right(self, row):
        tx, got = row.make(), short_run(row.id)
        plain = run(tx, FEW, "vmap")
        theirs = gcj.CompressorState(*got.states[:4])
        chex.assert_trees_all_equal(theirs.wire, plain.states.wire)
        slices.assert_same(row.id, (got.updates, theirs), tuple(plain))
        (norms,), gradient, feedback = got.states.norms.value.values(), FEW["only"], tx.settings.error_feedback
        assert (norms.shape, norms.dtype) == ((STEPS, 2, 3), np.float32)
        if feedback is not None:
            want = expected(feedback, gradient, got.states.residual.value["only"])
            np.testing.assert_allclose(norms, want, rtol=1e-5, atol=1e-5)
            return
        np.testing.assert_allclose(norms[..., 0], norms_of(gradient), rtol=1e-5)
        np.testing.assert_array_equal(norms[..., 1], norms[..., 0])
        # The error of the mean is the mean of the errors, which is at most as long as these are on average.
        mean = np.linalg.norm((gradient.mean(1) - got.updates["only"][:, 0]).reshape(STEPS, -1), axis=-1)
        assert (mean <= norms[..., 2].mean(1) + 1e-4).all()

    @pytest.mark.parametrize("id", ["qsgd-4", "qsgd-4-shuffle", "powersgd-2-plain", "randomk-plain-ring", "gradiveq"])
    def test_without_feedback_one_worker_loses_what_the_mean_lacks(self, id):
        grads = FEW["only"][:, :1]
        got = run(gcj.measured(BY_ID[id].make()), {"only": grads}, "vmap")
        norms = got.states.norms.value["only"]
        np.testing.assert_allclose(norms[..., 2], norms_of(grads - got.updates["only"]), rtol=1e-4, atol=1e-4)
        dense = {"gradiveq": 4}.get(id, 0)  # it sends as they are the gradients that it learns from
        assert (norms[:dense, 0, 2] < 1e-6).all()
        assert (norms[dense + 1 :, 0, 2] > 0.01).any()

    @every_context
    @pytest.mark.parametrize("id", ["powersgd-4", "qsgd-4", "topk-ef21", "gradiveq-ef"])
    def test_in_every_context(self, id, context):
        got, want = short_run(id, context), short_run(id)
        chex.assert_trees_all_close(got.states.norms, want.states.norms, rtol=2e-5, atol=2e-5)


class TestMetrics:
    def by_hand(self, state):
        """error, residual and both norms by leaf, and of all, of states [workers, ...] with a residual."""
        norms, residuals = state.norms.value, state.residual.value
        leaves = {}
        for path, x in norms.items():
            gradient, given, lost = (of_workers(x[..., i]) for i in range(3))
            owed = of_workers(residuals[path])
            leaves[path] = (lost / given, owed / gradient, owed, gradient)
        gradient, given, lost = (of_workers(*(x[..., i] for x in norms.values())) for i in range(3))
        owed = of_workers(*residuals.values())
        return leaves, (lost / given, owed / gradient, owed, gradient)

    @pytest.mark.parametrize("id", ["topk", "powersgd-2-decay", "onebit-mean", "accordion-powersgd"])
    @pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
    def test_by_hand(self, id, jitted):
        state = at(measured_run(id).states, -1)
        # As between steps: what is the same on all workers once.
        one = map_state(lambda x: x, lambda x: x[0], state)
        got = (jax.jit(gcj.metrics) if jitted else gcj.metrics)({"chain": (one, optax.EmptyState())})
        leaves, whole = self.by_hand(state)
        assert got.leaves.keys() == leaves.keys()
        for path, figures in leaves.items():
            np.testing.assert_allclose(got.leaves[path], figures, rtol=1e-5)
        np.testing.assert_allclose([getattr(got, name) for name in FIGURES], whole, rtol=1e-5)
        last, total = gcj.wire_bits(one)
        np.testing.assert_allclose((got.bytes, got.bytes_total), (last / 8, total / 8), rtol=1e-6)
        assert got.skipped == 0
        assert all((x.dtype, x.shape) == (jnp.float32, ()) for x in jax.tree.leaves(got))

    def test_a_state_replicated_for_pmap(self):
        state = at(measured_run("topk").states, -1)
        one = map_state(lambda x: x, lambda x: x[0], state)
        chex.assert_trees_all_close(gcj.metrics(state), gcj.metrics(one), rtol=1e-6)

    def test_inside_shard_map_it_tells_of_this_worker(self):
        state = at(measured_run("topk").states, -1)
        mesh, specs = gcj.make_mesh(WORKERS), map_state(lambda _: P("data"), lambda _: P(), state)
        one = map_state(lambda x: x, lambda x: x[0], state)

        def worker(state):
            mine = gcj.metrics(gcj.local_state(state))
            return jax.tree.map(lambda x: x[None], mine)

        each = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(specs,), out_specs=P("data")))(one)
        norms = [x[:, i] for i in (1, 2) for x in state.norms.value.values()]
        given, lost = (np.sqrt(sum(x**2 for x in part)) for part in (norms[:3], norms[3:]))
        np.testing.assert_allclose(each.error, lost / given, rtol=1e-5)
        np.testing.assert_allclose(each.leaves["conv"].residual_norm, state.norms.value["conv"][:, 2], rtol=1e-5)
        np.testing.assert_allclose(each.bytes, gcj.metrics(one).bytes)

    def test_in_a_step_and_beside_one(self):
        """Figures that a step of one's own returns are those that are read after it; train_step's too."""
        tx, mesh = problem.optimizer(gcj.measured(gcj.powersgd(2))), gcj.make_mesh(WORKERS)
        params, (batch,) = problem.params(), problem.batches(1)
        state = gcj.init(tx, params, mesh)
        empty = gcj.metrics(state)
        assert (empty.error, empty.residual, empty.bytes, empty.bytes_total) == (0, 0, 0, 0)

        @jax.jit
        def step(params, state, batch):
            params, state, loss = gcj.train_step(problem.loss_fn, tx, mesh)(params, state, batch)
            return state, gcj.metrics(state), loss

        state, inside, _ = step(params, state, batch)
        chex.assert_trees_all_close(inside, gcj.metrics(state), rtol=1e-6)
        assert 0 < inside.error < 1
        np.testing.assert_allclose(inside.error, inside.residual, rtol=1e-6)  # nothing was owed before the first step
        assert inside.bytes == gcj.wire_bits(state).last / 8

    def test_without_measured_there_is_what_the_state_has(self):
        state = at(run(BY_ID["topk"].make(), GRADS, "vmap").states, -1)
        got, full = (gcj.metrics(x) for x in (state, at(measured_run("topk").states, -1)))
        for figures in (got, *got.leaves.values()):
            assert (figures.error, figures.residual, figures.gradient_norm) == (None, None, None)
        assert got.residual_norm == full.residual_norm
        chex.assert_trees_all_equal(got[:3], full[:3])
        assert {path: x.residual_norm for path, x in got.leaves.items()} == {
            path: x.residual_norm for path, x in full.leaves.items()
        }

    @pytest.mark.parametrize("tx", [gcj.none(), gcj.topk(0.1, error_feedback=gcj.EF21())], ids=["none", "ef21"])
    def test_without_measured_and_without_a_residual(self, tx):
        got = gcj.metrics(tx.init(trees.zeros(trees.MIXED)))
        assert got[3:7] == (None,) * 4
        assert got.leaves == {}

    def test_without_feedback_nothing_is_owed(self):
        got = gcj.metrics(at(measured_run("qsgd-4").states, -1))
        assert got.error > 0.1
        assert (got.residual, got.residual_norm) == (0, 0)

    def test_under_ef21_the_residual_is_what_the_estimate_lacks(self):
        state = at(measured_run("topk-ef21").states, -1)
        got, lacking = gcj.metrics(state), flatten(LAST)[0]["conv"] - state.residual.value["conv"]
        np.testing.assert_allclose(got.leaves["conv"].residual_norm, np.linalg.norm(lacking), rtol=1e-5)
        np.testing.assert_allclose(got.leaves["conv"].gradient_norm, np.linalg.norm(LAST["conv"]), rtol=1e-5)

    def test_several_codecs_are_joined(self):
        codecs = {"a": gcj.measured(gcj.topk(0.1)), "b": gcj.measured(gcj.qsgd(4, min_size=0)), "c": gcj.topk(0.2)}
        tree = {"x": (64, 24), "y": (64, 16), "z": (48, 16)}
        tx = optax.partition(codecs, {"x": "a", "y": "b", "z": "c"})
        params, grads = trees.zeros(tree), trees.noise(tree, 3, (WORKERS,))

        def loss_fn(params, batch):
            return sum(jnp.sum(params[name] * jnp.mean(batch[name], axis=0)) for name in tree)

        _, state, _ = gcj.simulate(loss_fn, tx, WORKERS)(params, gcj.init(tx, params, WORKERS), grads)
        got = gcj.metrics(state)
        assert got.leaves.keys() == {"x", "y", "z"}
        assert got.bytes == gcj.wire_bits(state).last / 8
        x, y, z = (got.leaves[path] for path in "xyz")
        assert z[:2] == (None, None)
        np.testing.assert_allclose(x.gradient_norm, np.linalg.norm(grads["x"]), rtol=1e-5)
        # Nothing was owed, so what was given are the gradients; z counts among residuals alone.
        both = of_workers(x.gradient_norm, y.gradient_norm)
        lost = of_workers(x.error * x.gradient_norm, y.error * y.gradient_norm)
        want = (lost / both, x.residual_norm / both, of_workers(x.residual_norm, z.residual_norm), both)
        np.testing.assert_allclose(got[3:7], want, rtol=1e-5)

    def test_typed_axes(self):
        """Arrays on a mesh of explicit axes, as `jax.make_mesh` makes it."""
        mesh = jax.make_mesh((WORKERS,), ("data",))
        state = map_state(lambda x: x, lambda x: x[0], at(measured_run("topk").states, -1))
        want = gcj.metrics(state)
        with jax.set_mesh(mesh):
            lies = map_state(lambda _: NamedSharding(mesh, P("data")), lambda _: NamedSharding(mesh, P()), state)
            chex.assert_trees_all_close(gcj.metrics(jax.device_put(state, lies)), want, rtol=1e-6)


class TestMagnitudes:
    @pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e29])
    @pytest.mark.parametrize("id", ["topk", "powersgd-2-plain"])
    def test_squares_neither_overflow_nor_vanish(self, id, scale):
        scaled = jax.tree.map(lambda x: x * np.float32(scale), GRADS)
        got = run(gcj.measured(BY_ID[id].make()), scaled, "vmap").states
        want = jax.tree.map(lambda x: x * np.float32(scale), measured_run(id).states.norms.value)
        chex.assert_trees_all_close(got.norms.value, want, rtol=1e-4)
        figures, usual = gcj.metrics(at(got, -1)), gcj.metrics(at(measured_run(id).states, -1))
        np.testing.assert_allclose(figures[3:5], usual[3:5], rtol=1e-4)

    def test_a_step_that_is_far_from_the_one_before(self):
        grads = {"w": np.ones((3, 2, 40, 24), np.float32) * np.float32([1, 1e30, 1e-30])[:, None, None, None]}
        got = run(gcj.measured(gcj.topk(0.1)), grads, "vmap").states.norms.value["w"]
        # The last gradient is 10^60 times less than what is owed, beside which its norm counts as zero.
        np.testing.assert_allclose(got[:, 0, 0], np.float32([1, 1e30, 0]) * math.sqrt(960), rtol=1e-5)
        np.testing.assert_allclose(got[1, :, 2], got[2, :, 1], rtol=1e-5)  # what was left is what is given next

    @pytest.mark.parametrize("size", [0, 1, 31, 33, 4096])
    def test_a_norm(self, size):
        x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
        np.testing.assert_allclose(norm(jnp.asarray(x)), np.linalg.norm(x), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(lambda: norm(jnp.zeros(size)))(), 0)

    def test_accelerators_find_the_same(self, monkeypatch):
        g, owed = (trees.noise((40, 24), seed) * np.float32(1e25) for seed in (5, 6))
        for there in (False, True):
            monkeypatch.setattr("gradcomp_jax.norms.on_cpus", lambda there=there: there)
            got = of_terms((jnp.asarray(g), jnp.asarray(owed)))
            np.testing.assert_allclose(got / 1e25, [np.linalg.norm(x / 1e25) for x in (g, g + owed)], rtol=1e-5)

    def test_leaves_of_16_bits_and_without_elements(self):
        grads = {"h": trees.noise((64, 24), 4, (2,)).astype(jnp.bfloat16), "none": np.zeros((2, 0, 3), np.float32)}
        state = run(gcj.measured(gcj.none(error_feedback=True)), jax.tree.map(lambda x: x[None], grads), "vmap").states
        h = grads["h"].astype(np.float64)
        np.testing.assert_allclose(state.norms.value["h"][0, :, 0], norms_of(h[None])[0], rtol=1e-5)
        # What is lost is what 16 bits do not hold of the mean.
        assert 0 < state.norms.value["h"][0, 0, 2] < 0.01 * state.norms.value["h"][0, 0, 1]
        assert not state.norms.value["none"].any()


class TestSteps:
    @pytest.mark.parametrize("id", ["topk", "gradiveq-ef"])
    def test_a_skipped_step_leaves_them(self, id):
        grads = jax.tree.map(np.copy, GRADS)
        grads["conv"][5, 1, 0] = np.nan
        states = run(gcj.measured(BY_ID[id].make()), grads, "vmap").states
        chex.assert_trees_all_equal(at(states.norms, 5), at(states.norms, 4))
        assert (states.norms.value["conv"][6] != states.norms.value["conv"][5]).all()
        got = gcj.metrics(at(states, 5))
        assert got.skipped == 1
        assert np.isfinite(jax.tree.leaves(got)).all()

    def test_a_step_that_another_codec_skips_leaves_them(self):
        tx = optax.partition({"a": gcj.measured(gcj.powersgd(2)), "b": gcj.none()}, {"layer1": "a", "layer2": "b"})

        def loss_fn(params, batch):
            return problem.loss_fn(params, batch) + jnp.sum(params["layer2"]["bias"]) * jnp.sum(batch["poison"])

        params, (first, second) = problem.params(), problem.batches(2)
        step, state = gcj.simulate(loss_fn, tx, WORKERS), gcj.init(tx, params, WORKERS)
        params, state, _ = step(params, state, first | {"poison": jnp.zeros(32)})
        _, after, _ = step(params, state, second | {"poison": jnp.zeros(32).at[3].set(jnp.nan)})
        chex.assert_trees_all_equal(gcj.metrics(after).leaves, gcj.metrics(state).leaves)
        assert gcj.metrics(after).skipped == 1

    def test_delayed_and_in_buckets(self):
        """Figures of the gradients that were exchanged, which are those of the step before."""
        tx = gcj.measured(gcj.topk(0.1, aggregate="gather", buckets=2))
        late, alone = run(gcj.delayed(tx), GRADS, "vmap"), run(tx, GRADS, "vmap")
        assert not any(x[0].any() for x in late.states.codec.norms.value.values())
        for path, x in alone.states.norms.value.items():
            np.testing.assert_allclose(late.states.codec.norms.value[path][1:, :, 0], x[:-1, :, 0], rtol=1e-6)
        chex.assert_trees_all_close(at(alone.states.norms, 0), at(measured_run("topk").states.norms, 0), rtol=1e-5)
        assert gcj.metrics(at(late.states, -1)).error > 0

    @pytest.mark.parametrize("feedback", [True, False])
    def test_memory_is_overwritten_where_it_lies(self, feedback):
        """No copy of the residual, of which the old is read for one norm, and the new for another."""
        tx = gcj.powersgd(2, error_feedback=feedback)
        grads, needed = {"w": jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)}, []
        for one in (tx, gcj.measured(tx)):
            mesh, like = gcj.make_mesh(4), {"w": jnp.zeros((256, 256))}
            specs = gcj.state_specs(one, like)

            def worker(grads, state, one=one):
                updates, state = one.update(jax.tree.map(lambda x: x[0], grads), gcj.local_state(state))
                return gcj.global_state(state), updates

            update = jax.shard_map(worker, mesh=mesh, in_specs=(P("data"), specs), out_specs=(specs, P()))
            state = jax.eval_shape(lambda one=one, like=like: gcj.init(one, like, 4))
            program = jax.jit(update, donate_argnums=1).lower(grads, state).compile()
            needed.append(program.memory_analysis().temp_size_in_bytes)
        assert needed[1] - needed[0] < 4 * 256 * 256 * (0.2 if feedback else 1.2)


class TestState:
    tx = optax.chain(gcj.measured(gcj.topk(0.1)), optax.sgd(0.1, momentum=0.9))

    @functools.cached_property
    def trained(self):
        mesh = gcj.make_mesh(WORKERS)
        params, state = gcj.place(problem.params(), mesh), gcj.init(self.tx, problem.params(), mesh)
        step = gcj.train_step(problem.loss_fn, self.tx, mesh)
        for batch in problem.batches(3):
            params, state, _ = step(params, state, batch)
        return params, state, mesh

    def test_flush_leaves_the_figures_of_the_last_step_that_was_compressed(self):
        params, state, mesh = self.trained
        _, after = gcj.flush(self.tx, params, state, mesh)
        chex.assert_trees_all_equal(after[0].norms, state[0].norms)
        got = gcj.metrics(after)
        assert got.error == gcj.metrics(state).error
        assert (got.residual, got.residual_norm) == (0, 0)

    @pytest.mark.parametrize("workers", [2, 3, 8])
    def test_for_other_workers_each_has_the_mean(self, workers):
        _, state, _ = self.trained
        after = gcj.resize_workers(state, workers)
        for path, old in state[0].norms.value.items():
            groups = workers if workers == 2 else 1
            want = np.asarray(old).reshape(groups, -1, 3).mean(1)
            np.testing.assert_allclose(after[0].norms.value[path], np.broadcast_to(want, (workers, 3)), rtol=1e-6)
        np.testing.assert_allclose(gcj.metrics(after).error, gcj.metrics(state).error, rtol=0.02)

    def test_a_checkpoint_for_other_workers(self, tmp_path):
        params, state, _ = self.trained
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(1, args=ocp.args.StandardSave({"params": params, "opt_state": state}))
        mesh = gcj.make_mesh(2)
        like = {"params": problem.params(), "opt_state": gcj.init(self.tx, problem.params(), mesh)}
        got = gcj.restore(tmp_path, like, mesh)["opt_state"]
        chex.assert_trees_all_close(got[0].norms, gcj.resize_workers(state, mesh)[0].norms)
        plain = optax.chain(gcj.topk(0.1), optax.sgd(0.1, momentum=0.9))
        like = {"params": problem.params(), "opt_state": gcj.init(plain, problem.params(), mesh)}
        with refuses("beside what like has leaf 'opt_state/0/norms/value/"):
            gcj.restore(tmp_path, like, mesh)

    def test_the_rest_of_the_state_is_where_it_was(self):
        """So that a checkpoint differs in the norms alone."""
        params = trees.zeros(trees.MIXED)
        plain, more = (jax.tree_util.tree_leaves_with_path(tx.init(params)) for tx in (gcj.topk(0.1), self.tx))
        names = [{jax.tree_util.keystr(path) for path, _ in leaves} for leaves in (plain, more)]
        assert {f"[0]{name}" for name in names[0]} <= names[1]

    def test_a_state_without_norms_is_refused(self):
        params, (batch,) = problem.params(), problem.batches(1)
        state = gcj.init(optax.chain(gcj.topk(0.1), optax.sgd(0.1, momentum=0.9)), params, WORKERS)
        with refuses(
            "opt_state is not one of tx", "[0].norms", "is missing", "make a new one by init(tx, params, mesh)"
        ):
            gcj.simulate(problem.loss_fn, self.tx, WORKERS)(params, state, batch)


class TestAcross:
    @pytest.mark.parametrize("id", ["powersgd-4", "topk-shuffle", "qsgd-4", "topk-ef21"])
    def test_the_shards_of_a_slice_are_one_leaf(self, id):
        inner = BY_ID[id].make()
        inner = gcj.Compressor(inner.init, inner.update)
        tx = gcj.across(gcj.measured(inner))
        assert tx == gcj.measured(gcj.across(inner))
        grads = trees.noise(trees.MIXED, 1, (3, slices.SLICES, slices.CHIPS))
        plain, got = slices.run(gcj.across(inner), grads), slices.run(tx, grads)
        slices.assert_same(id, got.updates, plain.updates)
        for link in ("between", "inside"):
            assert gcj.wire_bits(got.last, link) == gcj.wire_bits(plain.last, link)
        figures = gcj.metrics(got.last)
        assert figures.bytes == gcj.wire_bits(got.last).last / 8
        for path, norms in got.last.norms.value.items():
            assert norms.shape == (slices.SLICES, slices.CHIPS, 3)
            # A slice's gradient is the mean of its chips'.
            whole = flatten(grads)[0][path][-1].mean(1)
            np.testing.assert_allclose(figures.leaves[path].gradient_norm, np.linalg.norm(whole), rtol=1e-5)
            if inner.settings.error_feedback == gcj.Feedback():
                owed = of_workers(got.last.residual.value[path])
                np.testing.assert_allclose(of_workers(norms[..., 2]), owed, rtol=1e-5)

    def test_for_other_slices_and_chips(self):
        tx = gcj.across(gcj.measured(gcj.topk(0.1)))
        grads = trees.noise(trees.MIXED, 1, (3, slices.SLICES, slices.CHIPS))
        state = slices.run(tx, grads).last
        for shape in ((1, 4), (2, 2)):
            after = gcj.resize_workers(state, slices.mesh_of(*shape))
            assert after.norms.value["conv"].shape == (*shape, 3)
            np.testing.assert_allclose(gcj.metrics(after).error, gcj.metrics(state).error, rtol=0.05)


class TestRefusals:
    def test_what_is_no_codec(self):
        for tx in (optax.sgd(0.1), gcj.delayed(gcj.onebit()), gcj.average("data"), optax.chain(gcj.topk(0.1))):
            with refuses("must be a codec", "delayed(measured(onebit()))"):
                gcj.measured(tx)

    def test_a_quantizer(self):
        with refuses("quantizer of codec 'powersgd' is measured", "measured(powersgd(..., quantizer=qsgd(4)))"):
            gcj.powersgd(2, quantizer=gcj.measured(gcj.qsgd(4)))

    def test_two_strengths_of_which_one_is(self):
        with refuses("low has measured=True, high has measured=False"):
            gcj.accordion(gcj.measured(gcj.powersgd(2)), gcj.powersgd(1), interval=2)
        both = gcj.accordion(*(gcj.measured(gcj.powersgd(r)) for r in (2, 1)), interval=2)
        assert both == gcj.measured(gcj.accordion(gcj.powersgd(2), gcj.powersgd(1), interval=2))

    def test_a_state_without_a_codec(self):
        with refuses("opt_state holds no codec's state", "got tuple", "optax.chain(measured(topk(0.01))"):
            gcj.metrics(optax.adam(0.1).init({"w": jnp.ones(3)}))

    def test_two_codecs_with_one_path(self):
        state = gcj.topk(0.1).init(trees.zeros(trees.ONE))
        with refuses("two codecs in opt_state have a leaf 'only'", "the state of each by itself"):
            gcj.metrics({"generator": state, "discriminator": state})
