"""scheduled: which strength is in use, what is sent, and what stays the same when it changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import program, run
from gradcomp_jax.testing.laws import at, require_conserved
from tests import problem, slices
from tests.rows import grows
from tests.test_across_state import assert_nothing_lost, trained
from tests.test_refusals import refuses

SHAPES = {"a": (24, 18), "b": (40, 32), "bias": (18,)}
RANKS = (1, 2, 4)


def one_two_four(step):
    return jnp.where(step < 2, 1, jnp.where(step < 4, 2, 4))


def ranks(schedule=one_two_four, **kwargs):
    return gc.scheduled([gc.powersgd(rank, **kwargs) for rank in RANKS], schedule)


def bits(got):
    return [gc.wire_bits(at(got.states, t)).last for t in range(len(got.updates["a"]))]


class TestRule:
    """The most that sends no more than is wanted, or else the least."""

    @pytest.mark.parametrize(
        ("wanted", "expected"), [(9, 4), (4, 4), (3.9, 2), (2, 2), (1.5, 1), (1, 1), (0.5, 1), (-1, 1), (np.nan, 1)]
    )
    def test_ranks(self, wanted, expected):
        codec = ranks().codec
        assert codec.values == (4, 2, 1)
        assert codec.values[int(codec.place(wanted))] == expected

    @pytest.mark.parametrize(("wanted", "expected"), [(9, 16), (16, 16), (17, 32), (32, 32), (64, 64), (99, 64)])
    def test_proportions_send_less_the_larger_they_are(self, wanted, expected):
        codec = gc.scheduled([gc.adaptive(x) for x in (64, 16, 32)], grows).codec
        assert codec.values == (16, 32, 64)
        assert codec.values[int(codec.place(wanted))] == expected

    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def test_products_of_a_schedule_are_as_good_as_the_values(self):
        """DGC's warm-up, whose float32 products are a little below some of them."""
        fractions = (0.25, 0.0625, 0.015625, 0.004, 0.001)
        falls = {1: 0.25, 2: 0.25, 3: 0.004 / 0.015625, 4: 0.25}
        wanted = optax.piecewise_constant_schedule(0.25, falls)
        codec = gc.scheduled([gc.topk(x) for x in fractions], wanted).codec
        assert [int(codec.place(wanted(step))) for step in range(6)] == [0, 1, 2, 3, 4, 4]


class TestWhatIsSent:
    def test_each_strength_sends_what_the_codec_alone_does(self):
        """And is a collective of its own in the program, one of a size, in both of PowerSGD's rounds."""
        grads = trees.noise(SHAPES, 0, (6, 4))
        got = run(ranks(), grads, "checked")
        alone = {rank: bits(run(gc.powersgd(rank), grads, "checked"))[0] for rank in RANKS}
        assert bits(got) == [alone[rank] for rank in (1, 1, 2, 2, 4, 4)]
        collectives = gc.collective_bytes(program(ranks(), grads, "checked")[0])
        assert len(collectives) == 2 * len(RANKS)

    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def test_training_changes_strength_without_compiling_anew(self):
        wanted = optax.piecewise_constant_schedule(1, {2: 2, 4: 2})
        tx = optax.chain(ranks(wanted), optax.sgd(0.05, momentum=0.9))
        step, params, state = gc.simulate(problem.loss_fn, tx, 4), problem.params(), gc.init(tx, problem.params(), 4)
        sent = []
        for batch in problem.batches(7):
            params, state, _ = step(params, state, batch)
            sent.append(gc.wire_bits(state).last)
        assert step._cache_size() == 1
        assert [sent.index(x) for x in sent] == [0, 0, 2, 2, 4, 4, 4]
        assert sent == sorted(sent)

    def test_a_skipped_step_is_not_counted(self):
        grads = trees.noise(SHAPES, 1, (6, 2))
        grads["a"][0, 1, 3, 3] = np.nan
        got = run(ranks(), grads, "vmap")
        assert got.states.codec.step[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert [bits(got).index(x) for x in bits(got)] == [0, 0, 0, 3, 3, 5]


def test_bits_of_qsgd_and_lengths_of_adaptive():
    """Codecs that draw, and that tell true lengths."""
    grads = trees.noise(SHAPES, 2, (4, 2))
    for strengths, settings in ((2, 4, 8), {"min_size": 0, "error_feedback": True}), ((4, 8), {}):
        make = functools.partial(gc.qsgd if settings else gc.adaptive, **settings)
        got = run(gc.scheduled([make(x) for x in strengths], grows), grads, "vmap")
        require_conserved(make(strengths[0]), grads, got, 1e-4)


class TestAround:
    def test_delayed(self):
        grads = trees.noise(SHAPES, 3, (6, 2))
        got = run(gc.delayed(ranks()), grads, "vmap")
        assert bits(got) == bits(run(ranks(), grads, "vmap"))
        for path in ("a", "b"):
            owed = got.states.codec.residual.value[path][-1].mean(0) + got.states.pending.value[path][-1].mean(0)
            given = grads[path].astype(np.float64).mean(1).sum(0)
            np.testing.assert_allclose(got.updates[path][:, 0].sum(0) + owed, given, atol=1e-4)

    def test_across(self):
        around = gc.scheduled([gc.across(gc.powersgd(rank)) for rank in RANKS], one_two_four)
        assert around == gc.across(ranks())
        assert_nothing_lost(*trained(optax.chain(around, optax.sgd(1.0)), slices.mesh_of(), 3), 3)

    def test_settings_come_from_the_codecs(self):
        tx = ranks(axis_name="node", min_size=500)
        assert (tx.settings.axis_name, tx.settings.min_size) == ("node", 500)
        assert list(tx.init(trees.zeros(SHAPES)).residual.value) == ["b"]

    def test_the_strongest_decides_which_leaves_are_compressed(self):
        tree = {"w": (6, 6)}  # in which rank 4 has 48 numbers
        assert list(ranks().init(trees.zeros(tree)).residual.value) == ["w"]


REFUSED = {
    "no list": (gc.powersgd(2), grows, "must be a list of two strengths of one codec or more"),
    "one": ([gc.powersgd(2)], grows, "a single one needs no schedule"),
    "no codec": ([gc.powersgd(2), optax.sgd(0.1)], grows, "codecs[1]=GradientTransformation"),
    "uncalled": ([gc.powersgd, gc.powersgd(1)], grows, "codecs[0]=<function powersgd"),
    "two codecs": ([gc.powersgd(2), gc.topk(0.1)], grows, "codecs[0] is powersgd by rank, codecs[1] is topk by"),
    "other settings": (
        [gc.topk(0.2), gc.topk(0.1), gc.topk(0.3, error_feedback=False)],
        grows,
        "codecs[0] has error_feedback=True, codecs[2] has error_feedback=False: they must agree in all but fraction",
    ),
    "no strength": ([gc.onebit(), gc.onebit()], grows, "codecs[0]: codec 'onebit' in these settings has one strength"),
    "nested": ([ranks(), ranks()], grows, "codec 'scheduled' in these settings has one strength only; scheduled sw"),
    "twice": ([gc.powersgd(2), gc.powersgd(2)], grows, "codecs has rank=2 more than once"),
    "no schedule": ([gc.powersgd(2), gc.powersgd(1)], 0.1, "schedule=0.1 must be a function of 1 argument"),
    "several": ([gc.powersgd(2), gc.powersgd(1)], lambda step: jnp.ones(3), "schedule gives float32[3], and must give"),
    "a tree": ([gc.powersgd(2), gc.powersgd(1)], lambda step: {"a": step}, "schedule gives {'a': Shape"),
    "nothing": ([gc.powersgd(2), gc.powersgd(1)], lambda step: None, "schedule gives None, and must give one real"),
    "truth": ([gc.powersgd(2), gc.powersgd(1)], lambda step: step > 3, "schedule gives bool[], and must give one real"),
}


@pytest.mark.parametrize("id", REFUSED)
def test_what_cannot_be_scheduled_is_refused(id):
    codecs, schedule, words = REFUSED[id]
    with refuses(words):
        gc.scheduled(codecs, schedule)
