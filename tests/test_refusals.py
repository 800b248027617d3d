"""Every refusal: what is wrong, where, and the way out."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from tests import problem


def refuses(*words, error=ValueError):
    """Expects an error whose message has all `words`, in order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


class TestArguments:
    @pytest.mark.parametrize("rank", [0, -1, 1.5, 2.0])
    def test_rank(self, rank):
        with refuses(f"rank={rank}", "whole number of at least 1"):
            gc.powersgd(rank)

    def test_min_rate(self):
        with refuses("min_rate=0", "positive"):
            gc.powersgd(2, min_rate=0)

    def test_refresh(self):
        with refuses("refresh=0", "whole number of at least 1"):
            gc.powersgd(2, refresh=0)

    @pytest.mark.parametrize("bits", [1, 3, 16])
    def test_bits(self, bits):
        with refuses(f"bits={bits}", "2, 4 or 8"):
            gc.qsgd(bits)

    def test_levels(self):
        with refuses("levels=8", "at most 7", "use more bits"):
            gc.qsgd(4, levels=8)

    def test_bucket_size(self):
        with refuses("bucket_size=30", "multiple of 4"):
            gc.qsgd(bucket_size=30)

    @pytest.mark.parametrize(
        "given",
        [{"bits": 0}, {"bits": 4.0}, {"levels": 0}, {"levels": 2.5}, {"bucket_size": -4}, {"min_size": 1.5}],
        ids=str,
    )
    def test_whole_numbers(self, given):
        ((name, value),) = given.items()
        with refuses(f"{name}={value} must be a whole number of at least"):
            gc.qsgd(**given)

    def test_norm(self):
        with refuses("norm='l1'", "'max', 'l2'"):
            gc.qsgd(norm="l1")

    def test_unknown_aggregation(self):
        with refuses("aggregate='scatter'", "'qsgd'", "use 'gather'"):
            gc.qsgd(aggregate="scatter")

    @pytest.mark.parametrize("codec", [gc.qsgd, gc.onebit, gc.signnorm, gc.topk, gc.adaptive, gc.float4])
    def test_a_sum_of_codes(self, codec):
        name = codec.__name__
        with refuses(f"'{name}' is not linear", "aggregate='psum' would add packed codes", "use 'gather', 'shuffle'"):
            codec(aggregate="psum")

    @pytest.mark.parametrize("codec", [gc.onebit, gc.signnorm, gc.topk, gc.adaptive, gc.float4])
    def test_a_ring_of_codes_of_large_error(self, codec):
        with refuses(
            f"codec '{codec.__name__}' loses too much", "aggregate='ring' would encode", "use 'gather', 'shuffle'"
        ):
            codec(aggregate="ring")

    @pytest.mark.parametrize("aggregate", ["gather", "shuffle"])
    @pytest.mark.parametrize("codec", [gc.powersgd, gc.gradiveq, gc.randomk, gc.randomblock])
    def test_a_linear_codec_gathered(self, codec, aggregate):
        words = (
            f"codec '{codec.__name__}' is linear: aggregate='{aggregate}' would",
            "use 'psum', 'ring'",
        )
        with refuses(*words):
            codec(aggregate=aggregate)
        with refuses("codec 'qsgd' is linear", "use 'psum', 'ring'"):
            gc.qsgd(shared_scale=True, aggregate=aggregate)

    @pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
    @pytest.mark.parametrize("codec", [gc.topk, gc.randomk, gc.randomblock])
    def test_fraction(self, codec, fraction):
        with refuses(f"fraction={fraction} must be above 0 and at most 1"):
            codec(fraction)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"fraction": 0.01, "chunk": 64, "k": 8}, "fraction=0.01 does not go with chunk=64 and k=8"),
            ({"fraction": 0.01, "k": 8}, "fraction=0.01 does not go with chunk=None and k=8"),
            ({"chunk": 64}, "chunk= goes with k=, as in topk(chunk=4096, k=64)"),
            ({"k": 8}, "k= goes with chunk="),
            ({"chunk": 0, "k": 1}, "chunk=0 must be a whole number of at least 1"),
            ({"chunk": 64.0, "k": 8}, "chunk=64.0 must be a whole number of at least 1"),
            ({"chunk": 64, "k": 0}, "k=0 must be a whole number of at least 1"),
            ({"chunk": 64, "k": 65}, "k=65 must be at most chunk=64"),
            ({"chunk": 64, "k": 8, "bits": 4}, "bits=4 of codec 'topk' must be 2, or None for whole float32 values"),
            ({"chunk": 64, "k": 8, "bits": 2.0}, "bits=2.0 of codec 'topk' must be 2"),
            ({"chunk": 64, "k": 8, "levels": "mean"}, "levels='mean' must be one of 'chunk', 'sigma'"),
            ({"chunk": 64, "k": 8, "bits": None, "levels": "sigma"}, "levels='sigma' is for values of 2 bits"),
            ({"bits": None}, "bits=None and levels='chunk' are for chunks: give chunk= and k= too"),
            ({"fraction": 0.1, "levels": "sigma"}, "bits=2 and levels='sigma' are for chunks"),
        ],
        ids=str,
    )
    def test_chunks(self, given, words):
        with refuses(words):
            gc.topk(**given)

    def test_a_chunk_has_no_strength_to_switch(self):
        pair = [gc.topk(chunk=64, k=k) for k in (8, 4)]
        for around in (lambda: gc.accordion(*pair, interval=2), lambda: gc.scheduled(pair, lambda step: step)):
            with refuses("codec 'topk' in these settings has one strength only", "the fraction of topk"):
                around()

    def test_a_stream_that_no_int32_can_number(self):
        tx, leaves = gc.topk(chunk=4096, k=64), {name: jax.ShapeDtypeStruct((2**20, 2**10), "float32") for name in "ab"}
        with refuses("a stream of 2147483648 elements has more than an int32 can number", "with buckets="):
            gc.describe(tx, leaves, 2)
        assert gc.describe(gc.topk(chunk=4096, k=64, buckets=2), leaves, 2).totals.sent == 2**19 * 83

    @pytest.mark.parametrize("bucket_size", [0, 3, 8.0, -2])
    def test_bucket_size_of_float4(self, bucket_size):
        with refuses(f"bucket_size={bucket_size} must be a"):
            gc.float4(bucket_size=bucket_size)

    @pytest.mark.parametrize("codec", [gc.randomk, gc.randomblock])
    def test_fraction_or_rank(self, codec):
        with refuses("fraction=0.1 and rank=2 both say how much", f"'{codec.__name__}'", "give one of them"):
            codec(0.1, rank=2)
        with refuses("rank=0 must be a whole number of at least 1"):
            codec(rank=0)

    @pytest.mark.parametrize(
        ("codec", "given", "words"),
        [
            (gc.adaptive, {"proportion": 1}, "proportion=1 must be above 1"),
            (gc.adaptive, {"proportion": float("nan")}, "proportion=nan must be above 1"),
            (gc.adaptive, {"threshold_scope": "row"}, "threshold_scope='row' must be one of 'matrix', 'column'"),
            (gc.adaptive, {"capacity": 0}, "capacity=0 must be above 0"),
            (gc.onebit, {"threshold": "median"}, "threshold='median' must be one of 'zero', 'mean'"),
            (
                gc.onebit,
                {"second_residual": True, "aggregate": "gather"},
                "second_residual=True keeps the loss of the second",
            ),
            (gc.onebit, {"second_residual": True, "error_feedback": False}, "got aggregate=None, error_feedback=False"),
            (gc.signnorm, {"majority": True, "error_feedback": True}, "votes have no magnitude"),
            (gc.qsgd, {"code": "huffman"}, "code='huffman' must be 'packed' or 'elias'"),
            (gc.qsgd, {"code": "elias", "aggregate": "ring"}, "code='elias' is for aggregate='gather' and 'shuffle'"),
            (gc.qsgd, {"code": "elias", "shared_scale": True}, "integers of a shared scale are summed as they are"),
            (gc.qsgd, {"code": "elias", "capacity": -1}, "capacity=-1 must be above 0, bits an element"),
            (gc.qsgd, {"capacity": 2}, "capacity=2 is that of Elias' code, which is not used here: pass code='elias'"),
        ],
        ids=lambda x: str(x) if isinstance(x, dict) else "",
    )
    def test_new_codecs(self, codec, given, words):
        with refuses(words):
            codec(**given)

    def test_columns_along_an_axis_that_is_not_there(self):
        with refuses("axis=2 is not an axis of leaf 'w' of shape (80, 80)", "leave it out with compress="):
            gc.onebit(axis=2).init({"w": jnp.zeros((80, 80))})

    @pytest.mark.parametrize("codec", [gc.powersgd, gc.gradiveq, gc.randomk, gc.randomblock])
    def test_quantizers(self, codec):
        name = codec.__name__
        for quantizer, shown in (
            (gc.onebit(), "'onebit'"),
            (optax.sgd(0.1), "GradientTransformation"),
            ("qsgd", "'qsgd'"),
        ):
            with refuses("quantizer=", shown, f"codec '{name}' must be a qsgd(...), which rounds without bias"):
                codec(quantizer=quantizer)
        with refuses("quantizer=qsgd(error_feedback=True)", f"codec '{name}'", "residuals of its own", "leave it out"):
            codec(quantizer=gc.qsgd(error_feedback=True))
        with refuses("aggregate='ring' beside a quantizer", "as in qsgd(aggregate='ring')"):
            codec(quantizer=gc.qsgd(), aggregate="ring")
        with refuses("select='energy' goes without a quantizer"):
            gc.gradiveq(quantizer=gc.qsgd(), select="energy")

    @pytest.mark.parametrize(
        ("low", "high", "given", "words"),
        [
            (gc.powersgd(4), gc.powersgd(1), {"interval": 0}, "interval=0 must be a whole number"),
            (gc.powersgd(4), gc.powersgd(1), {"window": 0}, "window=0 must be a whole number"),
            (gc.powersgd(4), gc.powersgd(1), {"window": 9}, "window=9 must be at most interval=8"),
            (gc.powersgd(4), gc.powersgd(1), {"threshold": 0}, "threshold=0 must be above 0"),
            (gc.powersgd(4), gc.powersgd(1), {"norm_source": "all"}, "must be one of 'mean', 'first_worker'"),
            (gc.powersgd(1), gc.powersgd(4), {}, "low has rank=1, which must be above high's rank=4"),
            (gc.powersgd(2), gc.powersgd(2), {}, "low has rank=2, which must be above high's rank=2"),
            (gc.adaptive(64), gc.adaptive(16), {}, "low has proportion=64, which must be below high's proportion=16"),
            (gc.powersgd(4), gc.topk(0.1), {}, "low is powersgd by rank, high is topk by fraction"),
            (gc.randomk(rank=4), gc.randomk(0.1), {}, "low is randomk by rank, high is randomk by fraction"),
            (gc.powersgd(4, seed=1), gc.powersgd(1), {}, "low has seed=1, high has seed=0: they must agree in all but"),
            (gc.topk(0.5), gc.topk(0.1, error_feedback=False), {}, "low has error_feedback=True, high has"),
            (gc.onebit(), gc.onebit(), {}, "low: codec 'onebit' in these settings has one strength only"),
            (gc.powersgd(4), gc.powersgd(1, quantizer=gc.qsgd()), {}, "high: codec 'powersgd' in these settings has"),
            (gc.qsgd(8, shared_scale=True), gc.qsgd(2), {}, "low: codec 'qsgd' in these settings has one strength"),
            (gc.powersgd(4), optax.sgd(0.1), {}, "must be a codec such as powersgd(rank=2)"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_accordion(self, low, high, given, words):
        with refuses(words):
            gc.accordion(low, high, **{"interval": 8, **given})

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"k": 0}, "k=0 must be a whole number of at least 1"),
            ({"ratio": 1}, "ratio=1 must be above 1"),
            ({"ratio": float("nan")}, "ratio=nan must be above 1"),
            ({"train_steps": 1}, "train_steps=1 must be a whole number of at least 2"),
            ({"train_steps": 4, "select": "holdout"}, "train_steps=4 must be a whole number of at least 5"),
            ({"compress_steps": 0}, "compress_steps=0 must be"),
            ({"warmup_steps": -1}, "warmup_steps=-1 must be"),
            ({"k_max": 0}, "k_max=0 must be"),
            ({"reuse": 0}, "reuse=0 must be"),
            ({"select": "best"}, "select='best' must be one of 'ratio', 'energy', 'holdout'"),
            ({"max_loss": 1.0}, "max_loss=1.0 must be above 0 and below 1"),
        ],
        ids=str,
    )
    def test_gradiveq(self, given, words):
        with refuses(words):
            gc.gradiveq(**given)

    def test_more_directions_than_samples_span(self):
        params = {"first": jnp.zeros((3, 3, 3, 16)), "conv": jnp.zeros((3, 3, 64, 64))}
        gc.gradiveq(train_steps=97).init(params)
        words = "leaf 'conv'", "K=768 at ratio=8 keeps d=96", "train_steps=96 samples span 95", "train_steps=97 or more"
        with refuses(*words):
            gc.gradiveq(train_steps=96).init(params)

    @pytest.mark.parametrize("decay", [0, -0.1, 1.5, float("nan")])
    def test_decay_of_feedback(self, decay):
        with refuses(f"decay={decay} must be above 0 and at most 1"):
            gc.Feedback(decay)

    @pytest.mark.parametrize("given", ["ef21", 0.9, None, gc.EF21, gc.Feedback])
    @pytest.mark.parametrize("codec", [gc.powersgd, gc.topk, gc.randomk, gc.gradiveq, gc.none])
    def test_feedback(self, codec, given):
        with refuses(f"error_feedback={given!r} must be True, False, Feedback(decay=...) or EF21()"):
            codec(error_feedback=given)

    def test_feedback_where_there_is_none(self):
        for kind in (gc.Feedback(0.9), gc.EF21()):
            with refuses("votes have no magnitude"):
                gc.signnorm(majority=True, error_feedback=kind)
            with refuses("quantizer=qsgd(error_feedback=True)", "residuals of its own", "leave it out"):
                gc.powersgd(quantizer=gc.qsgd(error_feedback=kind))
        low, high = (gc.topk(x, error_feedback=kind) for x, kind in ((0.5, gc.Feedback(0.9)), (0.1, gc.EF21())))
        with refuses("low has error_feedback=Feedback(decay=0.9), high has error_feedback=EF21()"):
            gc.accordion(low, high, interval=8)

    @pytest.mark.parametrize("dtype", ["float32", "float8_e5m2", "bf16", jnp.int16, 16])
    @pytest.mark.parametrize("codec", [gc.none, gc.powersgd, gc.topk, gc.cast])
    def test_dense_dtype(self, codec, dtype):
        with refuses(f"dense_dtype={dtype!r} must be 'bfloat16' or 'float16'", "leave it out"):
            codec(dense_dtype=dtype)

    def test_dense_dtype_of_what_is_inside(self):
        with refuses("quantizer=qsgd(dense_dtype='bfloat16') of codec 'powersgd'", "give dense_dtype to powersgd"):
            gc.powersgd(quantizer=gc.qsgd(dense_dtype=jnp.bfloat16))
        low, high = gc.powersgd(2, dense_dtype="bfloat16"), gc.powersgd(1, dense_dtype=jnp.bfloat16)
        gc.accordion(low, high, interval=8)
        with refuses("low has dense_dtype=dtype(bfloat16), high has dense_dtype=None: they must agree"):
            gc.accordion(low, gc.powersgd(1), interval=8)

    def test_cast(self):
        names = "must be one of 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2'"
        for dtype in ("float32", "float8", jnp.int8, None):
            with refuses(f"dtype={dtype!r} of codec 'cast'", names):
                gc.cast(dtype)
        with refuses("codec 'cast'", "aggregate='psum' would add packed codes; use 'gather', 'shuffle'"):
            gc.cast("float8_e5m2", aggregate="psum")
        with refuses("codec 'cast'", "use 'psum', 'gather', 'shuffle'"):
            gc.cast(aggregate="ring")
        with refuses("'cast' must be a qsgd without shared_scale, a topk or a signnorm"):
            gc.transformed(gc.cast(), "dct")
        words = "none of the 1 leaves", "would not shrink"
        with refuses(*words):
            gc.cast("float16", dense_dtype="float16").init({"w": jnp.zeros((8, 8))})

    @pytest.mark.parametrize("decay", [-0.1, 1.0])
    def test_decay(self, decay):
        with refuses(f"decay={decay}", "[0, 1)"):
            gc.ef_momentum(decay)

    @pytest.mark.parametrize(
        ("codec", "given", "words"),
        [
            (gc.powersgd, {"rnk": 2}, ["powersgd has no setting 'rnk': it has rank, min_rate,"]),
            (gc.powersgd, {"rank": True}, ["rank=True must be a whole number"]),
            (gc.powersgd, {"rank": problem.params()}, ["rank={'layer1'", "... (dict) must be a whole number"]),
            (gc.powersgd, {"min_rate": float("nan")}, ["min_rate=nan must be positive"]),
            (gc.powersgd, {"min_size": -1}, ["min_size=-1 must be a whole number of at least 0"]),
            (gc.powersgd, {"aggregate": "mean"}, ["aggregate='mean' is not known", "use 'psum', 'ring'"]),
            (gc.powersgd, {"allow_dense": "yes"}, ["allow_dense='yes' must be True or False"]),
            (gc.powersgd, {"compress": ["w"]}, ["compress=['w'] must be a function of 2 arguments or None"]),
            (gc.powersgd, {"compress": lambda leaf: True}, ["must be a function of 2 arguments or None"]),
            (gc.powersgd, {"split": lambda leaf: 1}, ["split=", "must be a function of 2 arguments or None"]),
            (gc.powersgd, {"quantizer": 8}, ["quantizer=8", "must be a qsgd(...)"]),
            (gc.powersgd, {"axis_name": ["a", "b"]}, ["axis_name=['a', 'b'] must be the name", "or a tuple of names"]),
            (gc.powersgd, {"axis_name": ()}, ["axis_name=() must be the name of a mesh axis"]),
            (gc.average, {"axis_name": 4}, ["axis_name=4 must be the name of a mesh axis"]),
            (gc.topk, {"fraction": "1%"}, ["fraction='1%' must be a number"]),
            (gc.topk, {"fraction": optax.constant_schedule(0.1)}, ["fraction=", "must be a number"]),
            (gc.topk, {"fraction": True}, ["fraction=True must be a number"]),
            (gc.qsgd, {"capacity": "2"}, ["capacity='2' must be a number or None"]),
            (gc.adaptive, {"sample": 1}, ["sample=1 must be True or False or None"]),
            (gc.onebit, {"axis": "last"}, ["axis='last' must be a whole number"]),
            (gc.powersgd, {"rank": jnp.ones((), int)}, ["rank is an array of jax", "'rank'", "in static_args"]),
            (gc.qsgd, {"shared_scale": jnp.ones(())}, ["shared_scale is an array of jax", "in static_args"]),
            (gc.Feedback, {"decay": "0.9"}, ["decay='0.9' must be a number"]),
            (gc.ef_momentum, {"decay": "0.9"}, ["decay='0.9' must be a number"]),
            (gc.ef_momentum, {"decay": optax.constant_schedule(0.9)}, ["goes through optax.inject_hyperparams"]),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_types(self, codec, given, words):
        with refuses(*words, error=(ValueError, TypeError)):
            codec(**given)

    def test_a_learning_rate_where_a_schedule_is_due(self):
        with refuses("learning_rate=0.1 must be a function of 1 argument or None"):
            gc.accordion(gc.powersgd(2), gc.powersgd(1), interval=3, learning_rate=0.1)

    @pytest.mark.parametrize("name", [*gc.CODECS, "transformed"])
    def test_inject_hyperparams_without_static_args(self, name):
        given = (gc.topk(0.1), "dct") if name == "transformed" else ()
        with refuses("is an array of jax", "optax.inject_hyperparams name", "all other settings", "in static_args"):
            optax.inject_hyperparams(getattr(gc, name))(*given).init(problem.params())

    def test_a_factory_that_is_not_called(self):
        for make in (optax.chain(gc.powersgd, optax.sgd(0.1)), optax.masked(gc.CODECS["topk"], True), gc.qsgd):
            with refuses("is passed uncalled: call it, such as", "(...)", error=TypeError):
                gc.init(make, problem.params(), 4)
        for ask in (gc.delayed, lambda tx: gc.transformed(tx, "dct"), lambda tx: gc.accordion(tx, tx, interval=2)):
            with refuses("<function topk", "must be a"):
                ask(gc.topk)

    @pytest.mark.parametrize("returned", ["yes", np.ones(3)], ids=["string", "array"])
    def test_a_predicate_that_returns_no_truth_value(self, returned):
        with refuses("compress= returned", "for leaf 'layer1/bias', it must return True or False"):
            gc.powersgd(compress=lambda path, leaf: returned).init(problem.params())

    def test_a_split_that_is_no_number(self):
        with refuses("split='1' of leaf 'layer1/kernel': of its 2 axes 1 to 1 make the rows"):
            gc.powersgd(split=lambda path, leaf: "1").init(problem.params())

    def test_mesh(self):
        with refuses("64 devices", "jax has 8", "jax_num_cpu_devices"):
            gc.make_mesh(64)
        with refuses("'node'", "0 workers"):
            gc.make_mesh({"node": 0, "local": 2})
        for workers in (0, 2.0, "2", True, gc.make_mesh(1)):
            with refuses(f"workers={workers!r} must be a whole number of at least 1"):
                gc.simulate(problem.loss_fn, gc.none(), workers)
        for workers in ("data", (2, 2), 2.0, {"data": True}):
            with refuses("axis 'data' of the mesh has", "it needs at least 1, a whole number"):
                gc.make_mesh(workers)

    @pytest.mark.parametrize("mesh", [(4,), "4", 4.0, True])
    def test_what_is_no_mesh(self, mesh):
        tx, params = gc.none(), problem.params()
        words = f"mesh={mesh!r} must be a mesh, such as make_mesh(4), or, for simulate, the number of workers"
        with refuses(words):
            gc.init(tx, params, mesh)
        with refuses(words):
            gc.resize_workers(gc.init(tx, params, 2), mesh)
        with refuses(f"mesh={mesh!r} must be a mesh, such as make_mesh(4); simulate takes a number of workers"):
            gc.train_step(problem.loss_fn, tx, mesh)
        with refuses("mesh=4 must be a mesh", "simulate takes a number"):
            gc.train_step(problem.loss_fn, tx, 4)

    def test_what_is_no_transformation(self):
        tx, params, mesh = problem.optimizer(gc.none()), problem.params(), gc.make_mesh(4)
        order = "must be an optax transformation", "The order of arguments is train_step(loss_fn, tx, mesh)"
        for call in (
            lambda: gc.init(params, tx, mesh),
            lambda: gc.init(params, tx, 4),
            lambda: gc.state_specs(params, tx),
            lambda: gc.train_step(tx, problem.loss_fn, mesh),
            lambda: gc.simulate(problem.loss_fn, mesh, tx),
        ):
            with refuses(*order):
                call()
        for several in ([gc.none(), optax.sgd(0.1)], ()):
            with refuses("of several make one by optax.chain(*tx)"):
                gc.simulate(problem.loss_fn, several, 4)

    def test_the_order_of_flushs_arguments(self):
        tx, params = problem.optimizer(gc.topk(0.1)), problem.params()
        state = gc.init(tx, params, 4)
        with refuses("must be an optax transformation"):
            gc.flush(params, state, tx, 4)
        with refuses("params hold an optimiser's state"):
            gc.flush(tx, state, params, 4)
        with refuses("mesh=(4,) must be a mesh"):
            gc.flush(tx, params, state, (4,))

    def test_what_is_no_program(self):
        with refuses("must be a compiled program, such as step.lower(...).compile()"):
            gc.collective_bytes(jnp.ones(3))


class TestTrees:
    @pytest.mark.parametrize("codec", [gc.powersgd, gc.qsgd])
    def test_nothing_to_compress(self, codec):
        vectors = {"scale": jnp.ones(64), "bias": jnp.ones(8)}
        with refuses("none of the 2 leaves", "'scale' of shape (64,)", "allow_dense=True"):
            codec().init(vectors)
        codec(allow_dense=True).init(vectors)
        with refuses("min_size=1000000", "allow_dense=True"):
            codec(min_size=1_000_000).init(problem.params())
        with refuses("compress="):
            codec(compress=lambda path, leaf: False).init(problem.params())

    def test_leaves_that_are_no_arrays(self):
        with refuses("params: leaf ['name'] is 'net', which is no array", "leave it out"):
            gc.init(gc.none(), {"name": "net", "w": jnp.ones(3)}, 4)
        with refuses("codec 'none' takes arrays, leaf 'scale' is 1.0", error=TypeError):
            gc.none().init({"scale": 1.0, "w": jnp.ones(3)})

    def test_a_state_for_parameters(self):
        with refuses("params hold an optimiser's state: the order is step(params, opt_state, batch)"):
            gc.none().init(gc.init(gc.none(), problem.params(), 2))

    @pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
    @pytest.mark.parametrize("codec", [gc.none(), gc.powersgd(), gc.qsgd(min_size=0)])
    def test_types(self, codec, dtype):
        with refuses("'a/count'", jnp.dtype(dtype).name, error=TypeError):
            codec.init({"a": {"count": jnp.ones((32, 32), dtype)}, "w": jnp.ones((32, 32))})

    def test_paths_that_collide(self):
        with refuses("same path"):
            gc.none().init({"a": {"b": jnp.ones(3)}, "a/b": jnp.ones(3)})

    def test_predicate_gets_path_and_leaf(self):
        seen = {}
        tx = gc.powersgd(1, compress=lambda path, leaf: seen.setdefault(path, leaf.shape) == (64, 64))
        state = tx.init(problem.params())
        assert seen["layer1/bias"] == (64,)
        assert list(state.codec.q) == ["layer1/kernel"]

    @pytest.mark.parametrize("codec", [gc.powersgd(2), gc.qsgd(min_size=0, bucket_size=64, error_feedback=True)])
    def test_a_state_of_another_tree(self, codec):
        grads = jax.tree.map(jnp.ones_like, problem.params())
        states = {
            "missing": codec.init({"layer1": grads["layer1"]}),
            "63]": codec.init({**grads, "layer1": {"kernel": jnp.ones((64, 63))}}),
            "[4, 64, 64]": gc.init(codec, grads, 4),
        }
        for word, state in states.items():
            with refuses("the state of codec", word, "init(tx, params, mesh)"):
                jax.vmap(lambda _, state=state: codec.update(grads, state), axis_name="data")(jnp.zeros(4))


def shard(worker, *args, check_vma=True, workers=4):
    return jax.shard_map(worker, mesh=gc.make_mesh(workers), in_specs=P(), out_specs=P(), check_vma=check_vma)(*args)


class TestReduction:
    @pytest.mark.parametrize("codec", [gc.none(), gc.powersgd(), gc.qsgd(min_size=0), gc.average("data")])
    def test_gradients_already_reduced(self, codec):
        params = problem.params()
        (batch,) = problem.batches(1)
        state = codec.init(params)

        def worker(params, state, batch):
            return codec.update(jax.grad(problem.loss_fn)(params, batch), state)[0]

        with refuses("gradient leaf 'layer1/bias'", "already reduced", "'data'", "vary(params, 'data')"):
            shard(worker, params, state, batch)

    @pytest.mark.parametrize("codec", [gc.none, gc.powersgd, gc.average], ids=["none", "powersgd", "average"])
    def test_axis_that_is_not_there(self, codec):
        tx = codec(axis_name="dta")
        params = problem.params()
        with refuses("axis_name='dta' is not bound", "shard_map, pmap or vmap"):
            tx.update(params, tx.init(params))
        with refuses("axis_name='dta' is not bound"):
            shard(lambda p: tx.update(gc.vary(p, "data"), tx.init(p))[0], params)
        with refuses("'dta' is not bound"):
            gc.vary(params, "dta")

    @pytest.mark.parametrize("codec", [gc.none, gc.powersgd])
    def test_axis_that_the_mesh_has_not(self, codec):
        with refuses("axis_name='node'", "not an axis of the mesh", "('data',)"):
            gc.init(codec(axis_name="node"), problem.params(), gc.make_mesh(2))

    def test_a_residual_returned_as_replicated(self):
        tx = gc.powersgd(2)
        params = problem.params()
        state = gc.init(tx, params, gc.make_mesh(4))

        def worker(params, state):
            grads = jax.tree.map(lambda p: p * 1.0, gc.vary(params, "data"))
            return tx.update(grads, gc.local_state(state))[1]

        specs = gc.state_specs(tx, params)
        mesh = gc.make_mesh(4)
        with pytest.raises(ValueError, match="out_specs"):
            jax.eval_shape(jax.shard_map(worker, mesh=mesh, in_specs=(P(), specs), out_specs=P()), params, state)

    def test_a_state_that_is_not_one_workers_row(self):
        tx = gc.powersgd(2)
        params = problem.params()
        state = gc.init(tx, params, 4)
        with refuses("residual", "(4, 64, 64)", "state_specs(tx, params)"):
            shard(gc.local_state, state)


class TestStep:
    def refused(self, words, loss_fn=problem.loss_fn, tx=None, batch=None, simulated=True, check_vma=True):
        tx = problem.optimizer(gc.none()) if tx is None else tx
        params = problem.params()
        batch = next(problem.batches(1)) if batch is None else batch
        mesh = gc.make_mesh(4)
        with refuses(*words):
            gc.train_step(loss_fn, tx, mesh, check_vma=check_vma)(params, gc.init(tx, params, mesh), batch)
        if simulated:
            with refuses(*words):
                gc.simulate(loss_fn, tx, 4)(params, gc.init(tx, params, 4), batch)

    def test_batch_that_does_not_divide(self):
        self.refused(["batch leaf \"['x']\" of shape (30, 64)", "4 workers"], batch=next(problem.batches(1, 30)))

    def test_scalar_in_the_batch(self):
        self.refused(["of shape ()", "4 workers"], batch={**next(problem.batches(1)), "z": jnp.float32(1)})

    def test_loss_that_is_reduced_already(self):
        def loss_fn(params, batch):
            return jax.lax.pmean(problem.loss_fn(params, batch), "data")

        self.refused(["already reduced", "('data',)", "worker's own"], loss_fn, simulated=False)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_nothing_that_aggregates(self, check_vma):
        words = ["still differ between the workers", "codec, none() or average()"]
        self.refused(words, tx=optax.sgd(0.1), check_vma=check_vma)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_one_axis_of_two(self, check_vma):
        params = problem.params()
        mesh = gc.make_mesh({"node": 2, "local": 2})
        codec = gc.powersgd(axis_name="node")
        for tx in (problem.optimizer(codec), optax.chain(codec, gc.average("local"), optax.sgd(0.1))):
            step = gc.train_step(problem.loss_fn, tx, mesh, check_vma=check_vma)
            with refuses("'layer1/bias' differs along mesh axis 'local' too", "average('local') before the codec"):
                step.lower(params, gc.init(tx, params, mesh), next(problem.batches(1)))

    @pytest.mark.parametrize(
        ("loss_fn", "words"),
        [
            (lambda params, batch: batch["x"].mean(1), ["an array of shape (8,) and type float32", "take jnp.mean"]),
            (lambda params, batch: (problem.loss_fn(params, batch), {}), ["loss is a tuple of 2", "has_aux=False"]),
            (lambda params, batch: jnp.sum(batch["x"] > 0), ["type int32, it must be a scalar of real floating type"]),
            (
                lambda params, batch: jax.lax.complex(*[problem.loss_fn(params, batch)] * 2),
                ["of shape () and type complex64"],
            ),
            (lambda params, batch: 1.0, ["loss is 1.0, it must be", "made of params"]),
            (lambda params, batch: None, ["loss is None, it must be"]),
            (lambda params, stats, batch: 1.0, ["must be a function (params, batch) -> loss, with has_aux=False"]),
            (3.0, ["loss_fn=3.0 must be a function (params, batch) -> loss"]),
        ],
        ids=["vector", "pair", "integer", "complex", "constant", "none", "three", "number"],
    )
    def test_losses(self, loss_fn, words):
        self.refused(words, loss_fn)

    @pytest.mark.parametrize(
        ("out", "has_aux", "has_state", "words"),
        [
            (lambda loss: loss, True, False, ["(loss, aux), with has_aux=True", "an array of shape ()"]),
            (lambda loss: (loss, 1, 2), True, False, ["has_aux=True", "a tuple of 3"]),
            (lambda loss: (loss, {"name": "x"}), True, False, ["beside the loss: leaf ['name'] is 'x'", "no array"]),
            (lambda loss: loss, False, True, ["(loss, model_state)", "an array of shape ()"]),
            (lambda loss: (loss, {}, {}), True, True, ["(loss, (model_state, aux))", "a tuple of 3"]),
            (lambda loss: (loss, {}), True, True, ["(loss, (model_state, aux))", "a dict of 0"]),
        ],
        ids=["no aux", "three", "string", "no state", "flat", "no pair"],
    )
    def test_what_is_beside_the_loss(self, out, has_aux, has_state, words):
        tx, params = problem.optimizer(gc.none()), problem.params()
        loss_fn = lambda params, *rest: out(problem.loss_fn(params, rest[-1]))  # noqa: E731
        step = gc.simulate(loss_fn, tx, 4, has_aux=has_aux, has_state=has_state)
        with refuses(*words):
            step(params, gc.init(tx, params, 4), *[{}] * has_state, next(problem.batches(1)))

    def test_the_order_of_a_steps_arguments(self):
        tx, params, batch = problem.optimizer(gc.none()), problem.params(), next(problem.batches(1))
        mesh = gc.make_mesh(4)
        for step, state in (
            (gc.train_step(problem.loss_fn, tx, mesh), gc.init(tx, params, mesh)),
            (gc.simulate(problem.loss_fn, tx, 4), gc.init(tx, params, 4)),
        ):
            for args, words in (
                ((params, state), "takes (params, opt_state, batch), got 2 arguments"),
                ((params, state, batch["x"], batch["y"]), "got 4 arguments; a batch of several arrays is one tuple"),
                (
                    (params, batch, state),
                    "the batch holds an optimiser's state: a step takes (params, opt_state, batch)",
                ),
                ((state, params, batch), "params hold an optimiser's state"),
                ((params, state, {"x": np.ones((0, 64))}), "of shape (0, 64) has no examples"),
                ((params, state, {}), "batch={} holds no array: each leaf's first axis counts examples"),
            ):
                with refuses(words):
                    step(*args)
        with refuses("has_state=True takes (params, opt_state, model_state, batch), got 3 arguments"):
            gc.simulate(lambda params, stats, batch: 0, tx, 4, has_state=True)(params, state, batch)

    def test_random_keys_in_the_model_state(self):
        def loss_fn(params, keys, batch):
            return problem.loss_fn(params, batch), keys

        tx = problem.optimizer(gc.none())
        params = problem.params()
        step = gc.simulate(loss_fn, tx, 4, has_state=True)
        with refuses("random key", "in the batch", error=TypeError):
            step(params, gc.init(tx, params, 4), {"key": jax.random.key(0)}, next(problem.batches(1)))


def test_bits_of_a_state_without_a_codec():
    with refuses("holds no codec's state"):
        gc.wire_bits(optax.sgd(0.1).init(problem.params()))


def test_length_of_codes_that_have_one_length():
    with refuses("holds no code of variable length"):
        gc.code_bits(gc.topk(0.1).init({"w": jnp.zeros((8, 8))}))


class TestTooLarge:
    """Refused by name, where counting would wrap."""

    HUGE = types.SimpleNamespace(shape=(2**16, 2**15), ndim=2, size=2**31, dtype=jnp.dtype(jnp.float32))

    @pytest.mark.parametrize("codec", [gc.topk(), gc.signnorm(), gc.randomk(), gc.randomblock(), gc.adaptive()])
    def test_leaves_of_more_elements_than_an_int32_numbers(self, codec):
        with refuses("'big'", "2^31 elements or more", repr(codec.codec.name), "compress="):
            codec.codec.shrinks("big", self.HUGE, 2**33)

    def test_leaves_at_two_levels_that_share_a_buffer(self):
        tx = gc.accordion(*(gc.topk(x, aggregate="gather") for x in (0.9, 0.1)), interval=10)
        with refuses("an int32 cannot count", "'big'"):
            traced(tx, {"big": (600, 10**6)})

    def test_eliass_code_beyond_what_it_can_address(self):
        with refuses("'qsgd'", "Elias' code of 1300000256 elements", "code='packed'"):
            traced(gc.qsgd(norm="l2", code="elias", aggregate="gather"), {"big": (1300, 10**6)})
        traced(gc.qsgd(norm="l2", aggregate="gather"), {"big": (1300, 10**6)})  # by itself it sends packed codes


def traced(tx, shapes):
    """An exchange among three workers, of which none is there."""
    grads = {path: jax.ShapeDtypeStruct((3, *shape), jnp.float32) for path, shape in shapes.items()}
    jax.eval_shape(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data"), grads)
