"""Outer steps: against the papers' algorithms in numpy, in each form of a step, and when something goes wrong."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gcj
from gradcomp_jax.by_parameter import ByParameter
from gradcomp_jax.exchange.ways import within
from gradcomp_jax.hlo import collective_bytes
from gradcomp_jax.testing import trees
from tests import networks
from tests import outer_reference as reference

WORKERS, ROWS = 3, 4
# Whole blocks of 64 x 64, and elements left over.
PARAMS = {"layer_0": np.float32(0.1) * np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)}
PARAMS |= {"layer_1": np.zeros(128, np.float32), "layer_2": np.zeros(128, np.float32)}


@functools.cache
def data(steps):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((steps, WORKERS * ROWS, 64)).astype(np.float32)
    return x, np.tanh(x @ rng.standard_normal((64, 128))).astype(np.float32)


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((x @ params["layer_0"] + params["layer_1"] + 2 * params["layer_2"] - y) ** 2)


def gradient(params, step, worker):
    x, y = (part[step, worker * ROWS : (worker + 1) * ROWS].astype(np.float64) for part in data(24))
    rest = 2 * (x @ params["layer_0"] + params["layer_1"] + 2 * params["layer_2"] - y) / y.size
    return {"layer_0": x.T @ rest, "layer_1": rest.sum(0), "layer_2": 2 * rest.sum(0)}


def batch(step, steps=1):
    x, y = data(24)
    return (x[step], y[step]) if steps == 1 else (x[step : step + steps], y[step : step + steps])


def train(step, tx, mesh, steps, first=None, at=0, call=1):
    """Parameters, state and the losses returned, after so many local steps."""
    params, state = first or (PARAMS, gcj.init(tx, PARAMS, mesh))
    losses = []
    for place in range(at, at + steps, call):
        params, state, loss = step(params, state, batch(place, call))
        losses.append(float(loss))
    return params, state, losses


def nothing(**settings):
    return gcj.outer(optax.sgd(0.1), every=4, codec=gcj.none(), **settings)


def whole(name, anchor, mean):
    return anchor - mean


def two_bits(owed):
    """Top 64 of each 4096 in two bits, in numpy: blocks of the matrix, and then what is left over."""
    blocks = owed["layer_0"].reshape(64, 2, 64).swapaxes(0, 1).reshape(2, -1)
    rest = np.concatenate([owed["layer_1"], owed["layer_2"]])
    chunks = np.concatenate([blocks, np.pad(rest, (0, 4096 - rest.size))[None]])
    sent = np.stack([chunk_of_two_bits(chunk) for chunk in chunks])
    matrix = sent[:2].reshape(2, 64, 64).swapaxes(0, 1).reshape(64, 128)
    return {"layer_0": matrix, "layer_1": sent[2, :128], "layer_2": sent[2, 128:256]}


def chunk_of_two_bits(chunk):
    places = np.argsort(-np.abs(chunk), kind="stable")[:64]
    places = places[chunk[places] != 0]
    sizes = np.abs(chunk[places])
    threshold = min(sizes.mean() + sizes.std(), sizes.max())
    for _ in range(3):
        threshold = (sizes[sizes >= threshold].mean() + mean_of(sizes[sizes < threshold])) / 2
    upper = float(np.float32(jnp.bfloat16(sizes[sizes >= threshold].mean())))
    lower = np.round(255 * mean_of(sizes[sizes < threshold]) / upper) / 255 * upper
    sent = np.zeros_like(chunk)
    sent[places] = np.sign(chunk[places]) * np.where(sizes >= threshold, upper, min(lower, upper))
    return sent


def mean_of(x):
    return x.mean() if x.size else 0.0


def four_bits(bucket):
    def send(owed):
        sent = {}
        flat = {name: np.pad(x.reshape(-1), (0, -x.size % bucket)).reshape(-1, bucket) for name, x in owed.items()}
        for name, rows in flat.items():
            top = np.abs(rows).max(1, keepdims=True)
            levels = np.concatenate([[0.0], 2.0 ** np.arange(-6, 1)])
            part = np.abs(rows) / np.where(top, top, 1)
            middle = (levels[1:] + levels[:-1]) / 2
            sent[name] = (np.sign(rows) * top * levels[np.searchsorted(middle, part, side="right")]).reshape(-1)
            sent[name] = sent[name][: owed[name].size].reshape(owed[name].shape)
        return sent

    return send


def statistical(owed):
    """Matrices in two bits a value; vectors as they are."""
    sent = dict(owed)
    for name, x in ((name, x) for name, x in owed.items() if x.ndim > 1):
        codes = np.clip(np.round((x - x.mean()) / (1.5 * x.std(ddof=1)) + 2), 0, 3)
        sent[name] = sum(np.where(codes == code, mean_of(x[codes == code]), 0) for code in range(4))
    return sent


METHODS = {
    "diloco": (
        lambda: gcj.diloco(optax.adamw(3e-3, weight_decay=0.1), every=6),
        {"inner": reference.adamw(3e-3, decay=0.1), "outer": reference.nesterov(0.7, 0.9), "send": None, "decay": None},
    ),
    "streaming_diloco": (
        lambda: gcj.streaming_diloco(optax.adamw(3e-3, weight_decay=0.0), every=6, fragments=3, delay=2),
        {
            "inner": reference.adamw(3e-3),
            "outer": reference.nesterov(0.4, 0.9),
            "send": four_bits(512),
            "decay": None,
            "parts": [["layer_0"], ["layer_1"], ["layer_2"]],
            "delay": 2,
            "alpha": 0.5,
        },
    ),
    "sparseloco": (
        lambda: gcj.sparseloco(optax.adamw(3e-3, b2=0.95, weight_decay=0.1), every=6),
        {"inner": reference.adamw(3e-3, b2=0.95, decay=0.1), "outer": whole, "send": two_bits, "decay": 0.95},
    ),
    "muloco": (
        lambda: gcj.muloco(optax.contrib.muon(3e-3), every=6),
        {"inner": reference.muon(3e-3), "outer": reference.nesterov(0.9, 0.8), "send": statistical, "decay": 0.9},
    ),
}


class TestMethods:
    @pytest.mark.parametrize("name", METHODS)
    def test_equals_numpy(self, name):
        """Three workers, three exchanges and more: the anchor, each worker's own parameters, and residuals."""
        make, settings = METHODS[name]
        tx, steps = make(), 21
        # In float32 Muon's iterations round so much that some values fall into another bin.
        with jax.numpy_dtype_promotion("standard"), jax.enable_x64(name == "muloco"):
            first = jax.tree.map(jnp.asarray, PARAMS if name != "muloco" else jax.tree.map(np.float64, PARAMS))
            first = first, gcj.init(tx, first, WORKERS)
            params, state, _ = train(gcj.simulate(loss_fn, tx, WORKERS), tx, WORKERS, steps, first)
        run = reference.Run(PARAMS, WORKERS, every=6, **settings).train(gradient, steps)
        chex.assert_trees_all_close(params, run.anchor, atol=1e-5)
        for worker in range(WORKERS):
            own = jax.tree.map(lambda x, w=worker: x[w], gcj.local_params(state))
            chex.assert_trees_all_close(own, run.own[worker], atol=1e-5)
        if settings["decay"] is not None:
            for worker in range(WORKERS):
                residual = {path: x[worker] for path, x in state.codec[0].residual.value.items()}
                owed = {path: run.residual[worker][path] for path in residual}
                chex.assert_trees_all_close(residual, owed, atol=1e-5)


SETTINGS = {
    "whole": {"codec": lambda: gcj.none()},
    "topk": {"codec": lambda: gcj.topk(0.2, aggregate="gather"), "residual_decay": 0.9},
    "fragments": {"codec": lambda: gcj.qsgd(4, min_size=0), "fragments": 3, "weigh": "steps"},
    "delay": {"codec": lambda: gcj.powersgd(2), "fragments": 2, "delay": 2, "alpha": 0.5},
}


def made(name, every=6, **changes):
    settings = SETTINGS[name] | changes
    outer = optax.sgd(0.7, 0.9, nesterov=True)
    codec = settings["codec"]()
    return gcj.outer(optax.sgd(0.3, 0.9), every=every, outer=outer, **settings | {"codec": codec})


def own_step(tx, mesh, static):
    """A step in a shard_map of one's own; if `static`, by programs of which each knows its place."""
    specs, by_place = gcj.state_specs(tx, PARAMS), {}
    spec = jax.sharding.PartitionSpec

    def at(place):
        def worker(params, state, rows):
            state = gcj.local_state(state)
            loss, grads = jax.value_and_grad(loss_fn)(gcj.local_params(state), rows)
            updates, state = tx.update(grads, state, params, value=loss, place=place)
            return optax.apply_updates(params, updates), gcj.global_state(state), state.loss

        mapped = jax.shard_map(
            worker, mesh=mesh, in_specs=(spec(), specs, spec("data")), out_specs=(spec(), specs, spec())
        )
        return jax.jit(mapped)

    def step(params, state, rows):
        place = int(state.place) if static else None
        if place not in by_place:
            by_place[place] = at(place)
        return by_place[place](params, state, rows)

    return step


class TestForms:
    """One algorithm in every form of a step."""

    @pytest.mark.parametrize("name", SETTINGS)
    def test_all_agree(self, name):
        tx, mesh = made(name), gcj.make_mesh(WORKERS)
        want = train(gcj.train_step(loss_fn, tx, mesh), tx, mesh, 18)
        forms = {
            "untyped": train(gcj.train_step(loss_fn, tx, mesh, check_vma=False), tx, mesh, 18),
            "simulated": train(gcj.simulate(loss_fn, tx, WORKERS), tx, WORKERS, 18),
            "own, by place": train(own_step(tx, mesh, static=True), tx, mesh, 18),
            "own, with branches": train(own_step(tx, mesh, static=False), tx, mesh, 18),
            "several steps a call": train(gcj.train_step(loss_fn, tx, mesh, steps=2), tx, mesh, 18, call=2),
            "a period a call": train(gcj.train_step(loss_fn, tx, mesh, steps=6), tx, mesh, 18, call=6),
        }
        for form, got in forms.items():
            chex.assert_trees_all_close(got[0], want[0], atol=1e-5, custom_message=form)
            chex.assert_trees_all_close(got[1].worker, want[1].worker, atol=1e-5, custom_message=form)
            assert gcj.wire_bits(got[1]) == gcj.wire_bits(want[1]), form
            np.testing.assert_allclose(got[2][-1], want[2][-1], rtol=1e-5, err_msg=form)

    def test_donated(self):
        tx, mesh = made("topk"), gcj.make_mesh(WORKERS)
        want = train(gcj.train_step(loss_fn, tx, mesh), tx, mesh, 13)
        first = jax.tree.map(jnp.array, PARAMS), gcj.init(tx, PARAMS, mesh)
        got = train(gcj.train_step(loss_fn, tx, mesh, donate=True), tx, mesh, 13, first)
        # Another program, in which products and sums may be contracted otherwise.
        chex.assert_trees_all_close(got[:2], want[:2], atol=1e-6)
        np.testing.assert_allclose(got[2], want[2], rtol=1e-6)

    def test_inside_jit(self):
        tx, mesh = made("topk"), gcj.make_mesh(WORKERS)
        step = gcj.train_step(loss_fn, tx, mesh)

        @jax.jit
        def scanned(params, state):
            turn = lambda carry, rows: (step(*carry, rows)[:2], ())  # noqa: E731
            return jax.lax.scan(turn, (params, state), jax.tree.map(lambda x: x[:9], data(24)))[0]

        got = scanned(gcj.place(PARAMS, mesh), gcj.init(tx, PARAMS, mesh))
        want = train(step, tx, mesh, 9)
        chex.assert_trees_all_close(got[0], want[0], atol=1e-6)

    @pytest.mark.parametrize("every", [2, 5])
    def test_swapped(self, every):
        """After another codec and another period took over, all forms agree; residuals and momentum go on."""
        tx, mesh = made("topk", codec=lambda: gcj.powersgd(2)), gcj.make_mesh(WORKERS)
        params, state, _ = train(gcj.train_step(loss_fn, tx, mesh), tx, mesh, 11)
        new_tx = made("topk", every)
        swapped = gcj.swap(tx, new_tx, params, state, mesh)
        chex.assert_trees_all_equal(swapped.worker, state.worker)
        chex.assert_trees_all_equal(
            swapped.codec[0].residual.value["layer_0"], state.codec[0].residual.value["layer_0"]
        )
        want = train(gcj.train_step(loss_fn, new_tx, mesh), new_tx, mesh, 7, (params, swapped), at=11)
        for static in (False, True):
            got = train(own_step(new_tx, mesh, static), new_tx, mesh, 7, (params, swapped), at=11)
            chex.assert_trees_all_close(got[0], want[0], atol=1e-6)
            assert gcj.wire_bits(got[1]) == gcj.wire_bits(want[1])

    def test_swapped_under_a_delay(self):
        """Another period needs a flush before, because nothing tells it what is on its way; another codec does not."""
        tx = made("delay")
        params, state, _ = train(gcj.simulate(loss_fn, tx, WORKERS), tx, WORKERS, 9)
        for changes in ({"every": 3}, {"delay": 1}):
            other = made("delay", **changes)
            with pytest.raises(
                ValueError, match=r"opt_state is at place 9 of every=6, .*Call flush.*Nothing was changed"
            ):
                gcj.swap(tx, other, params, state, WORKERS)
            flushed = gcj.flush(tx, params, state, WORKERS)
            swapped = gcj.swap(tx, other, *flushed, WORKERS)
            chex.assert_trees_all_equal(swapped, flushed[1])
        swapped = gcj.swap(tx, made("delay", codec=lambda: gcj.powersgd(1)), params, state, WORKERS)
        chex.assert_trees_all_equal((swapped.place, swapped.worker), (state.place, state.worker))

    def test_swapped_to_other_fragments(self):
        """As many, but of other leaves: nothing tells which leaves are on their way."""
        settings = {"every": 6, "codec": gcj.none(), "delay": 2}
        tx, other = (
            gcj.outer(optax.sgd(0.3), fragments=lambda path, last=last: int(path == last), **settings)
            for last in ("layer_1", "layer_2")
        )
        params, state, _ = train(gcj.simulate(loss_fn, tx, WORKERS), tx, WORKERS, 5)
        with pytest.raises(ValueError, match=r"'layer_1' is in fragment 1 of tx, and in 0 of new_tx. Call flush"):
            gcj.swap(tx, other, params, state, WORKERS)
        flushed = gcj.flush(tx, params, state, WORKERS)
        chex.assert_trees_all_equal(gcj.swap(tx, other, *flushed, WORKERS), flushed[1])

    def test_by_layer_and_fragments(self):
        """Patterns are for the whole tree: one may decide about no leaf of a fragment."""
        codec = lambda: gcj.per_layer({"layer_0": gcj.topk(0.2), "": gcj.topk(0.4)})  # noqa: E731
        tx = made("fragments", codec=codec)
        params, *_ = train(gcj.simulate(loss_fn, tx, WORKERS), tx, WORKERS, 9)
        own, *_ = train(own_step(tx, gcj.make_mesh(WORKERS), static=False), tx, gcj.make_mesh(WORKERS), 9)
        chex.assert_trees_all_close(params, own, atol=1e-6)
        typo = made("fragments", codec=lambda: gcj.per_layer({"lyer_0": gcj.topk(0.2), "": gcj.topk(0.4)}))
        with pytest.raises(ValueError, match="'lyer_0' decides about no leaf"):
            gcj.init(typo, PARAMS, WORKERS)

    def test_a_step_that_meets_other_states(self):
        """Two runs in turn by one step, and a run that is taken up in the middle, end as by steps of their own."""
        tx = made("delay")
        step = gcj.simulate(loss_fn, tx, WORKERS)
        want = train(step, tx, WORKERS, 16)
        ahead, late = train(step, tx, WORKERS, 9), train(step, tx, WORKERS, 4)
        for place in range(9, 16):
            ahead = step(*ahead[:2], batch(place))
            late = step(*late[:2], batch(place - 5))
        chex.assert_trees_all_equal(ahead[:2], want[:2])
        chex.assert_trees_all_equal(late[:2], train(step, tx, WORKERS, 11)[:2])

    def test_train_state(self):
        from flax.training.train_state import TrainState

        tx, mesh = made("topk"), gcj.make_mesh(WORKERS)
        step, state = gcj.train_step(loss_fn, tx, mesh), TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
        for place in range(7):
            state, loss = step(state, batch(place))
        want = train(step, tx, mesh, 7)
        chex.assert_trees_all_equal((state.params, state.opt_state, float(loss)), (*want[:2], want[2][-1]))
        assert int(state.step) == 7

    def test_rest_of_the_arguments(self):
        """Random keys, shared values, auxiliary outputs and accumulation, on a mesh and simulated."""

        def drawn(params, rows, key, scale):
            loss = loss_fn(params, rows) * (1 + 0 * jax.random.normal(key)) * scale
            return loss, {"rows": rows[0].shape[0] + jax.random.uniform(key)}

        tx, mesh = made("whole"), gcj.make_mesh(WORKERS)
        settings = {"has_aux": True, "rng": True, "shared": True, "accumulate": 2}
        found = []
        for step, over in (
            (gcj.train_step(drawn, tx, mesh, **settings), mesh),
            (gcj.simulate(drawn, tx, WORKERS, **settings), WORKERS),
        ):
            params, state = PARAMS, gcj.init(tx, PARAMS, over)
            for place in range(7):
                args = batch(place), jax.random.key(place), jnp.float32(1)
                params, state, loss, aux = step(params, state, *args)
            found.append((params, loss, aux))
            assert aux["rows"].shape == (WORKERS, 2)
            assert len(np.unique(aux["rows"])) == 2 * WORKERS
        chex.assert_trees_all_close(*found, atol=1e-5)
        several = gcj.train_step(drawn, tx, mesh, **settings, steps=3)
        got = several(PARAMS, gcj.init(tx, PARAMS, mesh), batch(0, 3), jax.random.key(0), jnp.float32(1))
        assert got[3]["rows"].shape == (WORKERS, 3, 2)
        assert len(np.unique(got[3]["rows"])) == 6 * WORKERS

    def test_data_parallel(self):
        """A whole step of one's own."""
        tx, mesh = made("topk"), gcj.make_mesh(WORKERS)

        @gcj.data_parallel(mesh=mesh, batch="rows")
        def step(params, state, rows):
            loss, grads = jax.value_and_grad(loss_fn)(gcj.local_params(state), rows)
            updates, state = tx.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state, loss

        got = train(step, tx, mesh, 8)
        want = train(gcj.train_step(loss_fn, tx, mesh), tx, mesh, 8)
        chex.assert_trees_all_close(got[:2], want[:2], atol=1e-6)


class TestLocalSteps:
    """What a step without an exchange is made of."""

    def test_program(self):
        tx, mesh = made("topk"), gcj.make_mesh(WORKERS)
        step, state = gcj.train_step(loss_fn, tx, mesh), gcj.init(tx, PARAMS, mesh)
        quiet = step.lower(PARAMS, state, batch(0), exchange=False).compile()
        assert not collective_bytes(quiet)
        assert "conditional" not in quiet.as_text()
        own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.worker)) // WORKERS
        rows = sum(x.nbytes for x in batch(0)) // WORKERS
        assert quiet.memory_analysis().argument_size_in_bytes == own + 4 + rows

    def test_program_under_a_delay(self):
        """Local steps alone are not those at whose end a fragment is adopted."""
        tx, mesh = made("delay"), gcj.make_mesh(WORKERS)
        step, state = gcj.train_step(loss_fn, tx, mesh), gcj.init(tx, PARAMS, mesh)
        alone = step.lower(PARAMS, state, batch(0), exchange=False)
        assert len(jax.tree.leaves(alone.args_info)) == len(jax.tree.leaves((state.worker, state.place, batch(0))))
        assert not collective_bytes(alone.compile())

    def test_exchange(self):
        """Its arguments are the anchor, and the whole state; nothing twice."""
        tx, mesh = made("topk"), gcj.make_mesh(WORKERS)
        step, state = gcj.train_step(loss_fn, tx, mesh), gcj.init(tx, PARAMS, mesh)
        compiled = step.lower(PARAMS, state, batch(0), exchange=True).compile()
        params = sum(x.nbytes for x in PARAMS.values())
        worker, residual, momentum = 2 * params, params, params  # own and its momentum, what is owed, and the outer one
        rows = sum(x.nbytes for x in batch(0)) // WORKERS
        small = compiled.memory_analysis().argument_size_in_bytes - (params + worker + residual + momentum + rows)
        assert 0 <= small < 100

    @pytest.mark.parametrize("shape", [(256, 256), (3, 3, 64, 64), (2**16,), (2**14, 4), (100, 16)])
    def test_gradients_that_are_not_finite(self, shape):
        """The test for finite numbers, which is a product for large matrices on CPUs."""
        largest = jnp.full(shape, jnp.finfo(jnp.float32).max)
        last = tuple(size - 1 for size in shape)
        tested = jax.jit(lambda x: within(x, 1))
        finite = largest, -largest, jnp.zeros(shape)
        assert all(map(tested, finite))
        assert not any(tested(x.at[last].set(wrong)) for x in finite for wrong in (jnp.inf, -jnp.inf, jnp.nan))

    def test_results_are_parameter_by_parameter(self):
        params = {"a": 1, "b": {"c": 2}}
        tree = {"count": 0, "momentum": {"a": 3, "b": {"c": 4}}, "params": params}
        ordered = ByParameter.of(tree, params)
        assert ordered.arrays == [3, 1, 4, 2, 0]
        assert ordered.tree == tree


NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
EXCHANGES = {
    "diloco": functools.partial(gcj.diloco, every=4),
    "streaming_diloco": functools.partial(gcj.streaming_diloco, every=4, fragments=2, delay=1),
    "sparseloco": functools.partial(gcj.sparseloco, every=4),
    "muloco": functools.partial(gcj.muloco, every=4),
    "powersgd": functools.partial(gcj.outer, every=4, codec=gcj.powersgd(4), outer=NESTEROV),
    "qsgd": functools.partial(gcj.outer, every=4, codec=gcj.qsgd(4, error_feedback=True), outer=NESTEROV),
}


class TestTransformer:
    """An exchange of a transformer of 3 million parameters between 4 workers, as compiled."""

    @pytest.mark.parametrize("name", EXCHANGES)
    def test_memory_and_bytes(self, name):
        """Arguments are the anchor and the state, nothing twice; temporaries take at most 4 times the parameters."""
        params, mesh = trees.zeros(networks.transformer(layers=4, width=208)), gcj.make_mesh(4)
        loss = lambda params, rows: jnp.mean(rows) * sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params))  # noqa: E731
        tx = EXCHANGES[name](optax.adam(1e-3))
        rows = gcj.shard_batch(np.ones(4, np.float32), mesh)
        given = gcj.place(params, mesh), gcj.init(tx, params, mesh)
        with jax.numpy_dtype_promotion("standard"):
            compiled = gcj.train_step(loss, tx, mesh).lower(*given, rows, exchange=True).compile()
        memory, size = compiled.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(params))
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((given, rows)))
        assert 0 <= held - memory.argument_size_in_bytes < 100  # the count of steps that nothing reads, and the loss
        assert memory.temp_size_in_bytes <= 4 * size
        if name == "sparseloco":
            assert 97 * sum(x.ring_bytes for x in collective_bytes(compiled)) <= 2 * 3 / 4 * size


def batch_norm(params, model_state, rows):
    return loss_fn(params, rows), model_state


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"every": 0}, "every=0 must be a whole number of at least 1"),
            ({"delay": 4}, "delay=4 must be below every=4"),
            ({"delay": -1}, "delay=-1 must be a whole number of at least 0"),
            ({"alpha": 1.5}, "alpha=1.5 must be from 0 to 1"),
            ({"weigh": "tokens"}, "weigh='tokens' must be None, 'steps', or a function"),
            ({"fragments": 0}, "fragments=0 must be a whole number of at least 1"),
            ({"codec": optax.sgd(0.1)}, "must be a codec, such as topk"),
            ({"codec": gcj.delayed(gcj.onebit())}, "must be a codec, such as topk"),
            ({"residual_decay": 0.9}, "residual_decay=0.9 is for a codec with error feedback"),
            ({"residual_decay": 0.0, "codec": gcj.topk()}, "decay=0.0 must be above 0"),
            ({"outer": gcj.powersgd(2)}, "outer=.* exchanges gradients"),
            ({"inner": gcj.powersgd(2)}, "inner=.* exchanges gradients"),
            ({"inner": None}, "inner=None must be an optax optimiser"),
            ({"outer": 0.7}, "outer=0.7 must be an optax optimiser"),
            ({"codec": gcj.across(gcj.none(), slow="data", fast="local", inside=False)}, "parameters in shards"),
        ],
    )
    def test_settings(self, settings, message):
        settings = {"inner": optax.sgd(0.1), "every": 4, "codec": gcj.none()} | settings
        with pytest.raises(ValueError, match=message):
            gcj.outer(settings.pop("inner"), **settings)

    @pytest.mark.parametrize(
        ("tx", "message"),
        [
            (lambda: optax.chain(nothing(), optax.scale(0.5)), "outer\\(...\\) is a whole optimiser"),
            (lambda: gcj.loss_scaled(nothing()), "outer\\(...\\) is a whole optimiser"),
            (lambda: nothing(fragments=4), "fragments=4 is more than the number of layers of the parameters, 3"),
            (lambda: nothing(fragments=lambda path: 1), "puts no leaf into fragment 0"),
            (lambda: nothing(fragments=lambda path: path), "must return an index from 0"),
            (
                lambda: gcj.outer(optax.chain(gcj.none(), optax.sgd(1.0)), every=4, codec=gcj.none()),
                "inner holds a codec",
            ),
            (
                lambda: gcj.outer(optax.sgd(1.0), every=4, codec=gcj.none(), outer=optax.chain(gcj.none())),
                "outer= holds a codec",
            ),
        ],
    )
    def test_optimisers(self, tx, message):
        with pytest.raises(ValueError, match=message):
            gcj.init(tx(), PARAMS, WORKERS)

    @pytest.mark.parametrize(
        ("loss", "settings", "message"),
        [
            (batch_norm, {"has_state": True}, "a model state would differ from worker to worker"),
            (lambda p, b: (loss_fn(p, b), 0), {"has_aux": True, "reduce_aux": "mean"}, "auxiliary outputs are each"),
            (loss_fn, {"steps": 0}, "steps=0 must be a whole number"),
        ],
    )
    def test_steps(self, loss, settings, message):
        with pytest.raises(ValueError, match=message):
            gcj.train_step(loss, nothing(), gcj.make_mesh(WORKERS), **settings)

    def test_steps_of_other_optimisers(self):
        with pytest.raises(ValueError, match="steps=2 is for outer"):
            gcj.simulate(loss_fn, optax.chain(gcj.none(), optax.sgd(0.1)), WORKERS, steps=2)

    def test_arguments(self):
        tx, mesh = nothing(), gcj.make_mesh(WORKERS)
        state = gcj.init(tx, PARAMS, mesh)
        step, several = gcj.train_step(loss_fn, tx, mesh), gcj.train_step(loss_fn, tx, mesh, steps=2)
        for call, message in (
            (lambda: step(PARAMS), "a step takes"),
            (lambda: step(state, PARAMS, batch(0)), "opt_state is dict"),
            (lambda: step(PARAMS, state, batch(0), 3), "takes \\(params, opt_state, batch\\)"),
            (lambda: step(PARAMS, state, jax.tree.map(lambda x: x[:4], batch(0))), "does not divide among"),
            (lambda: step(PARAMS, tx.init(PARAMS), batch(0)), "local form"),
            (lambda: step(PARAMS, gcj.init(tx, PARAMS, 2), batch(0)), "opt_state is of"),
            (lambda: several(PARAMS, state, batch(0)), "does not begin with an axis of steps=2"),
            (lambda: jax.jit(several)(PARAMS, state, batch(0, 2)), "called inside a jit"),
            (lambda: gcj.flush(tx, PARAMS, state, mesh, learning_rate=0.1), "learning_rate= is for other optimisers"),
            (lambda: gcj.local_params(optax.sgd(0.1).init(PARAMS)), "opt_state is not of an outer"),
            (lambda: tx.update(PARAMS, tx.init(PARAMS)), "outer needs the anchor"),
            (lambda: own_step(tx, mesh, True)(PARAMS, state._replace(place=-1), batch(0)), "place=-1 must be a whole"),
            (lambda: gcj.simulate(loss_fn, tx, WORKERS, axis_name="x"), "simulate has axis_name='x'"),
            (lambda: step.lower(PARAMS, state), "takes \\(params, opt_state, batch\\)"),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    def test_another_mesh(self):
        with pytest.raises(ValueError, match="between workers along \\('data',\\), and the mesh has the axes"):
            gcj.train_step(loss_fn, nothing(), gcj.make_mesh({"node": 2, "data": 2}))
        slices = gcj.outer(optax.sgd(0.1), every=2, codec=gcj.across(gcj.none()))
        with pytest.raises(ValueError, match="across slices"):
            gcj.init(slices, PARAMS, WORKERS)

    @pytest.mark.parametrize(
        "codec",
        [
            lambda: gcj.topk(0.1, aggregate="shuffle"),
            lambda: gcj.per_layer({"layer_0": gcj.topk(0.1), "": gcj.topk(0.2)}),
        ],
    )
    def test_sparseloco_by_shuffle(self, codec):
        with pytest.raises(ValueError, match="aggregate='gather'"):
            gcj.sparseloco(optax.sgd(0.1), codec=codec())

    def test_a_batch_on_several_devices(self):
        """XLA would gather more than is counted, which is refused in the first local step; what sums is not."""
        mesh, tx = gcj.make_mesh(WORKERS), made("topk")
        rows = gcj.shard_batch(batch(0), mesh)
        with pytest.raises(ValueError, match="simulate is given a batch that lies on several devices"):
            gcj.simulate(loss_fn, tx, WORKERS)(PARAMS, gcj.init(tx, PARAMS, WORKERS), rows)
        tx = made("whole", every=2)
        step, found = gcj.simulate(loss_fn, tx, WORKERS), []
        for lies in (batch(0), rows):
            params, state = PARAMS, gcj.init(tx, PARAMS, WORKERS)
            for _ in range(4):
                params, state, _ = step(params, state, lies)
            found.append(params)
        chex.assert_trees_all_close(*found, atol=1e-6)
