"""Codecs and states are objects like optax's own: copied, pickled, compared, serialised, and mapped over."""

import copy
import functools
import pickle

import flax.serialization
import jax
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax.testing import trees
from tests.table import BY_ID, EACH
from tests.test_refusals import refuses

TREE = {"conv": (3, 3, 8, 16), "layer": {"kernel": (64, 16), "bias": (16,)}}
CODECS = {row.id: row.make for row in [*EACH, BY_ID["topk-ef21"], BY_ID["powersgd-2-qsgd"], BY_ID["topk-dct"]]}
CODECS |= {
    "measured": lambda: gc.measured(gc.powersgd(2)),
    "measured-ef21": lambda: gc.measured(BY_ID["topk-ef21"].make()),
}
AROUND = {
    "delayed-measured": lambda: gc.delayed(gc.measured(gc.onebit(second_residual=True))),
    "delayed": lambda: optax.chain(gc.delayed(gc.onebit(second_residual=True)), gc.ef_momentum()),
    "partition": lambda: optax.partition({"a": gc.none(), "b": gc.topk(0.1)}, {"conv": "a", "layer": "b"}),
    "masked": lambda: optax.chain(optax.masked(gc.powersgd(2), {"conv": False, "layer": True}), optax.sgd(0.1, 0.9)),
}
ALL = CODECS | AROUND
OF_PARAMETERS = (".residual", ".pending", ".momentum", ".trace", ".mean")

made_of_each = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def state_of(tx, form):
    """A state of random bits."""
    params = trees.zeros(TREE)
    shapes = jax.eval_shape(tx.init if form == "local" else lambda p: gc.init(tx, p, 2), params)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.integers(0, 2, x.shape).astype(x.dtype), shapes)


def by_path(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def of_layers(path, leaf):
    return "layer" in path


def the_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)))


class TestCodecs:
    @pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: x._replace(init=x.init)])
    def test_copies(self, make, copied):
        codec = make()
        other = copied(codec)
        assert type(other) is gc.Compressor
        assert other == codec
        assert codec.settings.compress or codec == make()  # functions of their own are equal to none
        assert hash(other) == hash(codec)
        assert (other.codec, other.settings) == (codec.codec, codec.settings)

    def test_equal_codecs_share_what_is_compiled(self):
        assert gc.powersgd(2) != gc.powersgd(3)
        assert gc.powersgd(2) != gc.powersgd(2, min_size=3)
        assert len({gc.powersgd(2), gc.powersgd(2), gc.topk(0.1)}) == 2
        assert gc.powersgd(2, compress=of_layers) == gc.powersgd(2, compress=of_layers)

    def test_a_predicate_that_has_no_hash(self):
        class Rule(list):
            def __call__(self, path, leaf):
                return leaf.ndim in self

        codec = gc.powersgd(2, compress=Rule([2]))
        assert isinstance(hash(codec), int)
        assert list(codec.init(trees.zeros(TREE)).codec.q) == ["layer/kernel"]

    def test_pickle(self):
        for make in CODECS.values():
            if make().settings.compress is None:
                assert pickle.loads(pickle.dumps(make())) == make()

    @made_of_each
    def test_cloudpickle(self, make):
        cloudpickle = pytest.importorskip("cloudpickle")
        there = pickle.loads(cloudpickle.dumps(make()))
        assert the_same(state_of(there, "local"), state_of(make(), "local"))

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_serve_where_codecs_are_asked_for(self, copied):
        weak, strong, coder = (copied(codec) for codec in (gc.powersgd(4), gc.powersgd(1), gc.qsgd(8)))
        assert gc.accordion(weak, strong, interval=3) == gc.accordion(gc.powersgd(4), gc.powersgd(1), interval=3)
        assert gc.powersgd(quantizer=coder) == gc.powersgd(quantizer=gc.qsgd(8))
        assert gc.transformed(coder, "dct") == gc.transformed(gc.qsgd(8), "dct")
        chain = copy.deepcopy(optax.chain(gc.delayed(coder), optax.sgd(0.1)))
        assert jax.eval_shape(chain.init, trees.zeros({"w": (128, 128)}))

    def test_with_a_function_of_the_users(self):
        codec = gc.qsgd(8, min_size=0)
        tx = codec._replace(update=lambda grads, state, params=None, **extra: codec.update(grads, state, **extra))
        assert not isinstance(tx, gc.Compressor)
        assert not isinstance(codec._replace(init=lambda params: codec.init(params)), gc.Compressor)
        assert not isinstance(codec._replace(init=gc.qsgd(4).init), gc.Compressor)
        grads = trees.noise({"w": (64, 16)}, 0, (2,))
        one, other = (jax.vmap(lambda g, t=t: t.update(g, t.init(g))[0], axis_name="data")(grads) for t in (tx, codec))
        np.testing.assert_array_equal(one["w"], other["w"])
        for make in (
            lambda: gc.accordion(tx, tx, interval=3),
            lambda: gc.delayed(tx),
            lambda: gc.transformed(tx, "dct"),
        ):
            with refuses("must be a"):
                make()
        with refuses("must be a qsgd(...)"):
            gc.powersgd(quantizer=tx)


class TestStates:
    @made_of_each
    def test_flax_serialization(self, make):
        tx = make()
        state, other = state_of(tx, "global"), jax.tree.map(np.zeros_like, state_of(tx, "global"))
        assert the_same(flax.serialization.from_bytes(other, flax.serialization.to_bytes(state)), state)
        as_dict = flax.serialization.to_state_dict(state)
        assert all(hasattr(x, "dtype") for x in jax.tree.leaves(as_dict))
        assert the_same(flax.serialization.from_state_dict(other, as_dict), state)

    def test_steps_go_on_from_flax(self):
        tx = optax.chain(gc.delayed(gc.powersgd(2)), gc.ef_momentum(), optax.scale(-0.1))
        step = gc.simulate(lambda p, x: ((x @ p["w"] - 1) ** 2).mean(), tx, 2)
        params, x = trees.zeros({"w": (16, 8)}), trees.noise({"x": (4, 16)}, 0)["x"]
        params, state, _ = step(params, gc.init(tx, params, 2), x)
        back = flax.serialization.from_bytes(gc.init(tx, params, 2), flax.serialization.to_bytes(state))
        assert the_same(step(params, back, x), step(params, state, x))
        assert gc.wire_bits(back) == gc.wire_bits(state)
        assert the_same(gc.resize_workers(back, 4), gc.resize_workers(state, 4))

    @made_of_each
    def test_copies(self, make):
        state = state_of(make(), "global")
        for there in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
            assert the_same(there, state)

    def test_what_differs_between_workers(self):
        one = gc.PerWorker({"w": np.ones(3)}, ("node", "local"), "owed")
        assert (one.axis, one.role) == (("node", "local"), "owed")
        assert gc.PerWorker((), "data").role == "state"
        assert jax.tree.structure(one) == jax.tree.structure(gc.PerWorker({"w": 0}, ("node", "local"), "owed"))
        assert jax.tree.structure(one) != jax.tree.structure(gc.PerWorker({"w": 0}, ("node", "local")))
        assert jax.tree.structure(one) != jax.tree.structure(gc.PerWorker({"w": 0}, "node", "owed"))
        assert repr(one._replace(value=3)) == "PerWorker(value=3, axis=('node', 'local'), role='owed')"

    @pytest.mark.parametrize("form", ["local", "global"])
    @made_of_each
    def test_tree_map_params(self, make, form):
        tx = optax.chain(make(), optax.trace(0.9))
        state, whole = state_of(tx, form), lambda x: jax.tree.map(lambda _: "other", x)
        kinds = by_path(optax.tree_map_params(tx, lambda x: "params", state, transform_non_params=whole))
        assert kinds == {
            path: "params" if any(name in path for name in OF_PARAMETERS) else "other" for path in by_path(state)
        }
        assert the_same(optax.tree_map_params(tx, lambda x: x, state), state)

    def test_tree_get_and_set(self):
        tx = optax.chain(gc.powersgd(2), optax.adam(1e-3))
        state = state_of(tx, "global")
        get = functools.partial(optax.tree_utils.tree_get, state)
        assert get("residual") is state[0].residual
        assert get("q") is state[0].codec.q
        assert get("value") is state[0].residual.value
        changed = optax.tree_utils.tree_set(state, skipped=np.int32(7), mu=state[1][0].nu)
        assert gc.skipped(changed) == 7
        assert jax.tree.structure(changed) == jax.tree.structure(state)
        emptied = optax.tree_utils.tree_set(state, value={})
        assert (emptied[0].residual.value, emptied[0].residual.axis) == ({}, "data")

    @pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
    def test_no_parameters(self, make):
        state = make().init({})
        assert state.residual.value == {}
        assert jax.tree.structure(state) == jax.tree.structure(make().init([]))
