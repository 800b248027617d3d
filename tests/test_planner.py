"""The planner: arithmetic of its cost model, and plans of small trees."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gcj
from gradcomp_jax.planner import Link, candidates, cost, targets, work
from gradcomp_jax.planner.cost import Cost, Talk

SHAPES = {"w": jax.ShapeDtypeStruct((512, 256), jnp.float32), "b": jax.ShapeDtypeStruct((256,), jnp.float32)}
PLAIN = Link(8e6, 1e-3, 1.0)  # a megabyte a second, a millisecond


class TestCost:
    @pytest.mark.parametrize(
        ("talk", "seconds"),
        [
            (Talk("all-reduce", 1e6, 4), 6e-3 + 1.5),
            (Talk("all-reduce", 1e6, 4, calls=5), 30e-3 + 1.5),
            (Talk("all-gather", 1e6, 4), 3e-3 + 3.0),
            (Talk("all-to-all", 1e6, 4), 3e-3 + 0.75),
            (Talk("reduce-scatter", 1e6, 4), 3e-3 + 0.75),
            (Talk("collective-permute", 1e6, 4), 1e-3 + 1.0),
            (Talk("all-reduce", 0, 1000), 2 * 10 * 1e-3),  # a tree
            (Talk("all-reduce", 0, 1000, tree=False), 2 * 999 * 1e-3),
            (Talk("all-reduce", 1e6, 1), 0.0),
        ],
    )
    def test_a_collective_takes_its_latencies_and_its_bytes(self, talk, seconds):
        assert cost.seconds(talk, PLAIN) == pytest.approx(seconds)

    def test_headers_and_devices_that_share_a_link_slow_it(self):
        assert Link(8e6).seconds(1e6) == pytest.approx(1.046)
        assert PLAIN.shared(4).seconds(1e6) == 4.0

    def test_an_exchange_hides_behind_no_more_than_the_backward_pass(self):
        assert Cost(3.0, codec=0.5, wire=1.0, inside=0.2, overlap=0.5).step == pytest.approx(3.0 + 0.5 + 1.2 - 0.6)
        assert Cost(3.0, wire=100.0, overlap=1.0).hidden == 2.0

    def test_an_exchange_is_spread_over_its_period(self):
        assert Cost(1.0, codec=10.0, wire=20.0, every=10).step == 4.0

    @pytest.mark.parametrize(
        ("steps", "name"),
        [
            ([("gentle", 0.50), ("fast", 0.48)], "gentle"),
            ([("gentle", 0.60), ("fast", 0.48)], "fast"),
            ([("gentle", 0.95), ("fast", 0.92)], None),
            ([], None),
        ],
    )
    def test_a_codec_is_chosen_if_it_wins_by_the_margin(self, steps, name):
        chosen = cost.choose(steps, 1.0, 0.1, 0.05)
        assert (chosen and chosen.name) == name


class TestTargets:
    @pytest.mark.parametrize(
        ("text", "link"),
        [
            ("1gbit", Link(1e9, 1e-4)),
            ("2.5 Gbit/s", Link(2.5e9)),
            ("100mbit 20ms", Link(1e8, 0.02)),
            ("400gbit, 5us", Link(4e11, 5e-6)),
        ],
    )
    def test_a_link_is_read_from_a_text(self, text, link):
        read = targets.link_of(text)
        assert read == link._replace(latency_seconds=pytest.approx(link.latency_seconds))

    @pytest.mark.parametrize("link", ["fast", "1gb", 10, Link(0), "0mbit"])
    def test_other_links_are_refused(self, link):
        with pytest.raises(ValueError, match="link="):
            targets.link_of(link)

    def test_unknown_devices_are_refused(self):
        with pytest.raises(ValueError, match="device='h1000' must be one of h100"):
            targets.device_of("h1000")


class TestMessages:
    @pytest.mark.parametrize("name", [*candidates.codecs(), "ring"])
    def test_they_add_up_to_the_bytes_that_are_described(self, name):
        tx = gcj.qsgd(4, aggregate="ring") if name == "ring" else candidates.codecs()[name].tx
        told = gcj.describe(tx, SHAPES, 6)
        sent = math.fsum(Talk(x.kind, x.bytes, 6, x.calls).sent for x in told.collectives)
        # Bits are rounded up, of each collective.
        assert told.totals.sent - 1 <= sent <= told.totals.sent

    def test_those_inside_a_worker_are_told_apart(self):
        told = gcj.describe(gcj.across(gcj.none()), SHAPES, {"node": 2, "local": 4})
        assert {x.axes for x in told.collectives if x.bytes > 1000} == {("node",), ("local",)}


def planned(link, codecs=None, **more):
    """A plan for eight workers, with a few codecs."""
    codecs = {"gentle": gcj.cast(), "strong": gcj.powersgd(rank=1)} if codecs is None else codecs
    settings = {"workers": 8, "device": "cpu", "step_seconds": 0.05} | more
    return gcj.plan(None, SHAPES, link=link, codecs=codecs, **settings)


class TestPlan:
    def test_a_fast_link_needs_no_compression(self):
        told = planned("100gbit 1us")
        assert told.best == "none"
        assert "too little to win" in told.reason
        assert "recommended: do not compress: " in str(told)

    def test_a_slow_link_needs_it(self):
        told = planned("10mbit")
        assert told.best == "strong"
        assert [row.name for row in told.rows] == ["strong", "gentle", "none"]
        assert told.row("none").speedup == 1
        assert told.row("strong").speedup == told.row("none").cost.step / told.row("strong").cost.step

    def test_a_codec_that_costs_more_than_it_saves_is_not_recommended(self):
        told = planned("1gbit", {"slow": gcj.topk(0.01)}, step_seconds=1e-4, device=slow_device())
        assert told.best == "none"
        assert "which is not 10 % faster" in told.reason

    def test_outer_steps_are_recommended_apart(self):
        told = planned("1mbit", {"rare": gcj.diloco(optax.sgd(0.1), every=100)})
        assert (told.best, told.best_outer) == ("none", "rare")
        assert "100 steps" in told.outer_reason
        dense, rare = told.row("none"), told.row("rare")
        assert rare.sent == pytest.approx(dense.sent / 100, rel=0.01)
        assert rare.cost.wire == pytest.approx(dense.cost.wire, rel=0.01)

    def test_devices_of_a_worker_share_its_link_and_the_codec_s_work(self):
        one, four = (planned("10mbit", {"a": gcj.qsgd(4)}, devices_per_worker=n) for n in (1, 4))
        assert four.row("a").sent == pytest.approx(one.row("a").sent / 4, rel=0.05)
        assert four.row("a").cost.wire == pytest.approx(one.row("a").cost.wire, rel=0.05)
        assert four.row("a").cost.codec < one.row("a").cost.codec / 2
        assert four.row("a").cost.inside > 0 == one.row("a").cost.inside

    def test_overlap_is_that_of_the_platform_or_as_given(self):
        assert [row.cost.overlap for row in planned("1gbit").rows] == [0, 0, 0]
        gpu = planned("1gbit", device="h100", overlap={"strong": 0.25})
        assert {row.name: row.cost.overlap for row in gpu.rows} == {"none": 5 / 6, "gentle": 0, "strong": 0.25}

    def test_a_codec_that_refuses_the_parameters_is_told(self):
        told = planned("1gbit", {"picky": gcj.powersgd(compress=lambda path, leaf: False)})
        assert [row.name for row in told.rows] == ["none"]
        assert "without picky: " in str(told)

    def test_a_rule_by_paths_may_follow_a_leaf_that_stands_for_others(self):
        shapes = {"a": SHAPES["w"], "b": SHAPES["w"]}
        codec = gcj.powersgd(compress=lambda path, leaf: path == "b")
        told = gcj.plan(None, shapes, workers=2, link="1gbit", device="cpu", step_seconds=1, codecs={"b": codec})
        assert told.row("b").cost.codec > 0

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"step_seconds": None}, "loss_fn is None"),
            ({"step_seconds": 0}, "step_seconds=0 must be above 0"),
            ({"workers": 0}, "workers=0 must be a whole number"),
            ({"device": None, "devices_per_worker": 2}, "devices_per_worker above 1 needs device="),
        ],
    )
    def test_wrong_arguments_are_refused(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            planned("1gbit", {}, **wrong)


def slow_device():
    """A device whose memory is slow."""
    return targets.DEVICES["cpu"]._replace(bytes_per_second=1e8)


def loss_fn(params, batch):
    return jnp.mean((batch @ params["w"] + params["b"]) ** 2)


class TestWork:
    def test_a_step_is_timed_here(self):
        params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), SHAPES)
        given = {"codecs": {"a": gcj.qsgd(4)}, "optimizer": optax.sgd(0.1), "repeats": 1}
        told = gcj.plan(loss_fn, params, np.ones((4, 512), np.float32), workers=2, link="1gbit", **given)
        assert "timed here" in told.setting["device"]
        assert all(row.cost.compute > 0 and row.cost.codec > 0 for row in told.rows)

    def test_shapes_cannot_be_timed(self):
        with pytest.raises(ValueError, match="are shapes"):
            gcj.plan(loss_fn, SHAPES, jax.ShapeDtypeStruct((4, 512), jnp.float32), workers=2, link="1gbit")

    def test_operations_are_those_of_both_passes(self):
        batch = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
        # The products of the forward pass, and of the weights' gradient; the batch needs none.
        assert work.operations(loss_fn, SHAPES, batch) == pytest.approx(2 * 2 * 1024 * 512 * 256, rel=0.05)

    def test_a_loop_is_refused(self):
        looped = lambda params, batch: jax.lax.scan(lambda x, _: (x * 1.1, None), loss_fn(params, batch), length=9)[0]  # noqa: E731
        with pytest.raises(ValueError, match="has a loop"):
            work.operations(looped, SHAPES, jax.ShapeDtypeStruct((8, 512), jnp.float32))

    def test_gathered_codes_cost_more_with_every_worker(self):
        codec, device = gcj.qsgd(4, aggregate="gather"), targets.DEVICES["cpu"]
        spent = {n: sum(x.counted(device) for x in work.exchange(codec, SHAPES, n)) for n in (1, 2, 3, 10)}
        assert spent[10] - spent[3] == pytest.approx(7 * (spent[3] - spent[2]))
        assert spent[2] > spent[1]

    def test_one_leaf_of_each_shape_stands_for_all(self):
        shapes = {f"w{i}": SHAPES["w"] for i in range(3)}
        few, times = work.reduced(shapes)
        assert (few, times) == ({"w0": SHAPES["w"]}, 3)
