"""What describe tells before anything is sent; that its bits are those that a step counts is a law, in test_laws.py."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gcj
from gradcomp_jax.compressor import compressor_states
from gradcomp_jax.describe import __main__ as command
from gradcomp_jax.describe import table, texts
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run
from tests import networks


def like(shapes, dtype=jnp.float32):
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=trees.is_shape)


def labels(params):
    return jax.tree.map(lambda x: "kernels" if x.ndim > 1 else "rest", params)


def kernels(path, leaf):
    return leaf.ndim > 1


class TestOptimisers:
    """Around a codec, and with several."""

    @pytest.mark.parametrize(
        "tx",
        [
            optax.chain(gcj.powersgd(2), optax.sgd(0.1, momentum=0.9)),
            optax.chain(optax.clip(1.0), gcj.topk(0.1, aggregate="shuffle"), optax.sgd(0.1)),
            optax.chain(gcj.delayed(gcj.signnorm()), optax.sgd(0.1)),
            gcj.loss_scaled(optax.chain(gcj.powersgd(1), optax.sgd(0.1))),
            optax.partition({"kernels": gcj.powersgd(2), "rest": gcj.none()}, labels),
            optax.chain(optax.partition({"kernels": gcj.powersgd(2), "rest": gcj.cast()}, labels), optax.sgd(0.1)),
            gcj.per_layer({"conv": gcj.topk(0.1), "": gcj.topk(0.3)}),
            gcj.per_layer({"conv": gcj.qsgd(2, min_size=0, bucket_size=32), "bias": gcj.none(), "": gcj.powersgd(1)}),
        ],
        ids=["momentum", "clip", "delayed", "loss_scaled", "partition", "two", "strengths", "families"],
    )
    def test_bits_and_memory_are_those_of_a_step(self, tx):
        told = gcj.describe(tx, like(trees.MIXED), 4)
        state = jax.tree.map(lambda x: x[0, 0], run(tx, trees.noise(trees.MIXED, 1, (1, 4)), "vmap").states)
        sent, states = gcj.wire_bits(state).last / 8, compressor_states(state)
        assert told.totals.sent == sent
        assert told.totals.residual == sum(x.nbytes for one in states for x in jax.tree.leaves(one.residual))
        assert [row.path for row in told.rows] == ["conv", "dense/bias", "dense/kernel", "gain"]
        for row in told.rows:
            kept = [one.residual.value[row.path].nbytes for one in states if row.path in one.residual.value]
            assert row.residual == sum(kept)
        rest = told.totals.flags + told.totals.packing
        assert sum(row.sent for row in told.rows) + rest == pytest.approx(sent)

    def test_each_leaf_is_of_its_codec_or_of_none(self):
        by_name = {"conv": "codec", "dense": "codec", "gain": "none"}
        tx = optax.partition({"codec": gcj.powersgd(2), "none": optax.sgd(0.1)}, by_name)
        conv, bias, kernel, gain = gcj.describe(tx, like(trees.MIXED), 4).rows
        assert (conv.codec, kernel.codec) == ("powersgd(rank=2)",) * 2
        assert (kernel.view, kernel.why) == ("40 x 24 at rank 2", "")
        assert (bias.codec, bias.why) == ("", "left out by the codec's rule for its shape")
        assert gain == ("gain", (), "float32", "", "", "reaches no codec", "", 0, None, 0)

    def test_what_waits_for_the_next_step_is_state(self):
        at_once, later = (
            gcj.describe(tx, like(trees.MIXED), 4).totals for tx in (gcj.topk(0.1), gcj.delayed(gcj.topk(0.1)))
        )
        elements = 40 * 24 + 24 + 3 * 3 * 8 * 16 + 1
        assert later == at_once._replace(state=at_once.state + 4 * elements)

    def test_estimates_of_ef21_are_memory_and_their_mean_is_state(self):
        plain, kept = (
            gcj.describe(gcj.powersgd(2, error_feedback=how), like(trees.MIXED), 4).totals
            for how in (False, gcj.EF21())
        )
        compressed = 4 * (40 * 24 + 3 * 3 * 8 * 16)
        assert (plain.residual, kept.residual) == (0, compressed)
        assert kept.state == plain.state + compressed


class TestKinds:
    """Of steps that send different amounts."""

    @pytest.mark.parametrize("select", ["energy", "holdout"])
    def test_rungs_of_gradiveq(self, select):
        tx = gcj.gradiveq(64, train_steps=5, compress_steps=2, warmup_steps=0, select=select)
        shapes = {"conv": (3, 3, 8, 16), "bias": (16,)}
        (part,) = gcj.describe(tx, like(shapes), 4).parts

        def worker(grads, position, rung):
            state = tx.init(grads)
            rungs = dict.fromkeys(state.codec.rung, rung)
            return tx.update(grads, state._replace(codec=state.codec._replace(position=position, rung=rungs)))[1].wire

        widths = tx.codec.widths("", 64)
        step = jax.jit(jax.vmap(worker, in_axes=(0, None, None), axis_name="data"))
        sent = lambda *at: gcj.wire_bits(step(trees.noise(shapes, 2, (4,)), *map(np.int32, at))).last / 8  # noqa: E731
        assert part.kinds == {
            "compressed, by the fewest numbers": sent(5, 0),
            "compressed, where no basis will do": sent(5, len(widths)),
            "last of training, with the bases": sent(4, 0),
            "dense": sent(0, 0),
        }
        assert part.kind == "compressed, by the fewest numbers"
        assert len(set(part.kinds.values())) == 4

    def test_a_learning_rate_that_accordion_knows_changes_nothing(self):
        levels = gcj.powersgd(4), gcj.powersgd(1)
        told = [
            gcj.describe(gcj.accordion(*levels, interval=2, learning_rate=rate), like(trees.MIXED), 4).parts[0].kinds
            for rate in (None, lambda step: jnp.where(step < 100, 0.1, 0.01))
        ]
        assert told[0] == told[1]
        assert told[0]["high"] < told[0]["low"]

    def test_strengths_of_a_schedule_are_those_that_it_uses(self):
        grows = lambda step: jnp.where(step < 10, 1, jnp.where(step < 5000, 2, 4))  # noqa: E731
        ranks = {rank: gcj.describe(gcj.powersgd(rank), like(trees.MIXED), 4).totals.sent for rank in (1, 2, 4)}
        tx = gcj.scheduled([gcj.powersgd(rank) for rank in (1, 2, 3, 4)], grows)
        (part,) = gcj.describe(tx, like(trees.MIXED), 4).parts
        assert part.kinds == {f"rank={rank}": sent for rank, sent in ranks.items()}
        assert part.kind == "rank=1"


class TestWorkers:
    """In each form in which they may be given."""

    def test_a_number_a_mesh_and_sizes_by_axis_are_one(self):
        tx = gcj.qsgd(min_size=0)
        told = gcj.describe(tx, like(trees.MIXED), 4)
        assert told.workers == {"data": 4}
        assert told == gcj.describe(tx, like(trees.MIXED), {"data": 4})
        assert told == gcj.describe(tx, like(trees.MIXED), gcj.make_mesh(4))
        assert told == gcj.describe(tx, like(trees.MIXED), jax.make_mesh((4,), ("data",)))

    def test_parameters_may_be_arrays(self):
        assert gcj.describe(gcj.powersgd(1), trees.zeros(trees.MIXED), 4) == gcj.describe(
            gcj.powersgd(1), like(trees.MIXED), 4
        )

    def test_one_worker_sends_nothing(self):
        totals = gcj.describe(gcj.topk(0.1), like(trees.MIXED), 1).totals
        assert (totals.sent, totals.ratio, totals.messages) == (0, None, {})

    def test_behind_a_mean_inside_a_node_each_device_sends_all(self):
        alone = gcj.describe(gcj.powersgd(2, axis_name="node"), like(trees.MIXED), {"node": 2}).totals
        tx = optax.chain(gcj.average("local"), gcj.powersgd(2, axis_name="node"))
        assert gcj.describe(tx, like(trees.MIXED), {"node": 2, "local": 4}).totals == alone

    @pytest.mark.parametrize(
        "inside", [False, lambda path, leaf: leaf.ndim < 2, {"w": P("local"), "v": P(None, "local"), "b": P()}]
    )
    def test_parameters_in_shards_send_as_much_as_whole_ones(self, inside):
        shapes = {"w": (64, 32), "v": (32, 64), "b": (16,)}
        whole, shards = (
            gcj.describe(gcj.across(gcj.powersgd(2), inside=how), like(shapes), {"node": 2, "local": 4})
            for how in (True, inside)
        )
        assert shards.totals.sent == whole.totals.sent
        assert shards.totals.residual == whole.totals.residual
        assert shards.totals.inside < whole.totals.inside
        assert [row.shape for row in shards.rows] == [(16,), (32, 64), (64, 32)]

    def test_what_is_told_is_of_the_devices_of_the_mesh(self):
        """GPUs sum in 16 bits, and CPUs do not."""
        sent = {}
        for platform in ("cpu", "gpu"):
            mesh = AbstractMesh((4,), ("data",), abstract_device=AbstractDevice(platform, None, platform))
            told = gcj.describe(gcj.none(dense_dtype="bfloat16"), like(trees.MIXED), mesh)
            assert told.platform == platform
            sent[platform] = told.totals.sent
        assert sent["cpu"] == 2 * sent["gpu"]

    @pytest.mark.parametrize(
        ("tx", "workers", "message"),
        [
            (gcj.powersgd(), 0, "workers=0 must be a mesh, a number of at least 1"),
            (gcj.powersgd(), True, "workers=True must be a mesh"),
            (gcj.powersgd(), "8", "workers='8' must be a mesh"),
            (gcj.powersgd(), {"data": 2.5}, r"workers=\{'data': 2.5\} must be a mesh"),
            (
                gcj.powersgd(),
                {"node": 2},
                r"has no axis 'data', along which a codec of tx has its workers: it has 'node'",
            ),
            (gcj.across(gcj.powersgd()), 8, r"along 'node', 'local': say how many .*workers=\{'node': 2, 'local': 2\}"),
            (
                gcj.across(gcj.powersgd(), inside=False),
                {"node": 2, "local": 3},
                "'w' of shape .* in 3 shards .* axis 0",
            ),
            (optax.sgd(0.1), 8, "tx holds no codec"),
            (gcj.powersgd, 8, "powersgd is passed uncalled"),
            (gcj.powersgd(compress=lambda path, leaf: False), 8, "would compress none of the 1 leaves"),
        ],
    )
    def test_refusals(self, tx, workers, message):
        with pytest.raises((ValueError, TypeError), match=message):
            gcj.describe(tx, like({"w": (64, 32)}), workers)

    @pytest.mark.parametrize("wrap", [lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.apply_if_finite(tx, 3)])
    def test_a_wrapper_that_calls_a_codec_in_some_steps(self, wrap):
        with (
            jax.numpy_dtype_promotion("standard"),  # which optax's wrappers need
            pytest.raises(ValueError, match="there is a wrapper around the codec, such as"),
        ):
            gcj.describe(wrap(gcj.powersgd()), like({"w": (64, 32)}), 8)

    def test_a_leaf_that_is_no_array(self):
        with pytest.raises(ValueError, match=r"leaf \['w'\] is 'a name', which is no array"):
            gcj.describe(gcj.powersgd(), {"w": "a name"}, 8)


class TestText:
    """For readers, and for programs."""

    def test_a_line_for_leaves_that_are_alike(self):
        told = gcj.describe(gcj.powersgd(2), like(networks.transformer(layers=3)), 8)
        lines = str(told).splitlines()
        names = [line.partition("  ")[0] for line in lines[: lines.index("")] if line[0] != " "]
        assert names == [
            "leaf",
            "block_*/attention/out/bias x 3",
            "block_*/attention/out/kernel x 3",
            "block_*/attention/qkv/bias x 3",
            "block_*/attention/qkv/kernel x 3",
            "block_*/mlp/down/bias x 3",
            "block_*/mlp/down/kernel x 3",
            "block_*/mlp/up/bias x 3",
            "block_*/mlp/up/kernel x 3",
            "block_*/norm_*/bias x 6",
            "block_*/norm_*/scale x 6",
            "embedding",
            "norm/bias",
            "norm/scale",
            "positions",
            "total",
        ]
        assert "block_*/mlp/up/kernel x 3         16x64 float32  " in str(told)

    def test_numbers_that_are_the_same_in_all_stay(self):
        rows = gcj.describe(gcj.powersgd(2), like({f"a{i}/conv2/w": (64, 64) for i in range(11)}), 8).rows
        assert [(path, count) for path, _, count in table.grouped(rows)] == [("a*/conv2/w", 11)]

    @pytest.mark.parametrize("tree", [networks.resnet18(), networks.transformer(), {"x" * 300: (64, 64)}, (64, 64)])
    def test_it_is_as_wide_as_a_page(self, tree):
        tx = optax.partition({"a": gcj.gradiveq(allow_dense=True), "b": gcj.powersgd(2)}, lambda _: "a")
        for told in (gcj.describe(tx, like(tree), 8), gcj.describe(gcj.powersgd(4), like(tree), {"data": 1024})):
            assert max(map(len, str(told).splitlines())) <= table.WIDTH

    def test_a_leaf_that_gains_little_has_advice(self):
        told = gcj.describe(gcj.powersgd(4), like({"w": (20, 12)}), 8)
        assert told.rows[0].advice in " ".join(str(told).split())
        assert told.rows[0].advice.startswith("see stacked=")

    @pytest.mark.parametrize(
        ("number", "text"),
        [(0, "0 B"), (999, "999 B"), (-336, "-336 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (27e9, "27.0 GB")],
    )
    def test_sizes(self, number, text):
        assert table.size(number) == text

    def test_json_is_the_same(self):
        told = gcj.describe(gcj.topk(0.1), like(trees.MIXED), 1)
        read = json.loads(told.as_json())
        assert read["rows"][0] == json.loads(json.dumps(told.rows[0]._asdict()))
        assert read["totals"] == told.totals._asdict()
        assert read["parts"][0]["kinds"] == {"": 0}

    @pytest.mark.parametrize(
        ("tx", "name"),
        [
            (gcj.powersgd(), "powersgd(rank=2)"),
            (gcj.qsgd(np.int64(8), norm="l2"), "qsgd(bits=8, norm='l2')"),
            (gcj.across(gcj.topk(0.1), slow="n"), "across(topk(fraction=0.1), slow='n')"),
            (gcj.onebit(compress=kernels), "onebit(threshold='zero', compress=kernels)"),
            (
                gcj.accordion(gcj.powersgd(4), gcj.powersgd(1), interval=9),
                "accordion(low=powersgd(rank=4), high=powersgd(rank=1), interval=9)",
            ),
            (
                gcj.per_layer({"b": gcj.none(), "": gcj.topk()}),
                "per_layer({'b': none(aggregate='psum'), '': topk()})",
            ),
            (
                gcj.scheduled([gcj.topk(0.1), gcj.topk(0.2)], schedule=optax.constant_schedule(1)),
                "scheduled([topk(fraction=0.1), topk(fraction=0.2)], schedule=<lambda>)",
            ),
        ],
    )
    def test_a_codec_is_told_by_its_call(self, tx, name):
        assert tx.name == name

    def test_the_call_is_no_part_of_what_a_codec_is(self):
        assert gcj.powersgd(2) == gcj.powersgd(rank=2) == gcj.powersgd()


def arrays():
    """What `--params=tests.test_describe:arrays` reads."""
    return {"w": jnp.zeros((64, 32)), "v": (64, 32), "u": like((8, 8), jnp.bfloat16), "b": np.zeros(3, np.float32)}


def text():
    """No shapes."""
    return {"w": "64 x 32"}


class TestCommand:
    """python -m gradcomp_jax.describe."""

    def told(self, capsys, *flags, params='{"w": [64, 32]}'):
        command.main([f"--params={params}", *flags])
        return capsys.readouterr().out

    def test_settings_are_those_of_the_factory(self, capsys):
        flags = ("--codec=powersgd", "--quantizer_bits=8", "--error_feedback=false", "--min_rate=0.5", "--workers=4")
        told = json.loads(self.told(capsys, *flags, "--json"))
        assert told["totals"]["residual"] == 0
        params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
        tx = gcj.powersgd(quantizer=gcj.qsgd(8), error_feedback=False, min_rate=0.5)
        assert told == json.loads(gcj.describe(tx, params, 4).as_json())

    def test_nodes_are_across(self, capsys):
        told = self.told(capsys, "--codec=powersgd", "--workers=2x4")
        assert "across(powersgd(rank=2)) by psum" in told
        assert "2 along 'node', 4 along 'local'" in told

    def test_shapes_of_a_file_and_of_a_function(self, tmp_path):
        file = tmp_path / "a:b"
        file.write_text('{"a": [2, 3], "b": [[4], "float16"], "c{0..1}": [[]], "d": []}')
        assert texts.shapes(str(file)) == {
            "a": like((2, 3)),
            "b": like((4,), jnp.float16),
            "c0": like(()),
            "c1": like(()),
            "d": like(()),
        }
        assert texts.shapes("tests.test_describe:arrays") == {
            "w": like((64, 32)),
            "v": like((64, 32)),
            "u": like((8, 8), jnp.bfloat16),
            "b": like((3,)),
        }

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--codec=power"], "--codec=power must be one of none, gradiveq, powersgd"),
            (["--rnk=4"], "--rnk=4: codec 'powersgd' has none, it has rank, min_rate"),
            (["--rank=4.5"], "--rank=4.5 of codec 'powersgd' must be a whole number"),
            (["--min_rate=x"], "--min_rate=x of codec 'powersgd' must be a number"),
            (["--error_feedback=perhaps"], "must be true or false"),
            (["--compress=x"], "'powersgd' has it, which is no text: give it in Python"),
            (["--rank=0"], "rank=0 must be a whole number of at least 1"),
            (["--rank", "4"], "'--rank' must be a setting of the codec, such as --rank=4"),
            (["--workers=4x"], "--workers=4x must be a number of at least 1, or nodes x devices"),
            (["--workers=0"], "--workers=0 must be"),
            (["--params=nothing.json"], "--params=nothing.json: there is no such file. Give JSON"),
            (["--params={"], "--params is no JSON: Expecting property name"),
            (["--params=no.module:at_all"], "--params=no.module:at_all is not found from here: No module named 'no'"),
            (["--params=math:at_all"], "--params=math:at_all is not found from here: module 'math' has no"),
            (["--params=tests.test_describe:text"], "returned leaf '64 x 32', which is neither an array nor a shape"),
            (['--params={"a": 3}'], "--params: 'a' is 3, and must be a shape such as [4096, 4096]"),
            (['--params={"a": [-3]}'], "'a' is [-3], and must be a shape"),
            (['--params={"a": [[3], "flat"]}'], "'a' is [[3], 'flat'], and must be a shape"),
            (['--params={"a": [[3], "float32", 1]}'], "and must be a shape"),
            (['--params={"a{3..1}": [3]}'], "{3..1} in path 'a{3..1}' must be a range such as {0..31}"),
            (['--params={"a{0..3}": [3], "a1": [3]}'], "--params has path 'a1' twice"),
            (['--params={"a": [3], "a": [3]}'], "--params has path 'a' twice"),
            (['--params={"a": [[64, 64], "int32"]}'], "leaf 'a' is int32: keep it out of the gradients"),
        ],
    )
    def test_refusals(self, capsys, flags, message):
        given = ["--codec=powersgd", "--workers=8", '--params={"w": [64, 32]}', *flags]
        with pytest.raises(SystemExit) as ended:
            command.main(given)
        assert ended.value.code in (1, 2)
        assert message in capsys.readouterr().err

    def test_a_file_that_is_a_list(self, capsys, tmp_path):
        (tmp_path / "shapes.json").write_text("[[3, 4]]")
        with pytest.raises(SystemExit):
            self.told(capsys, "--codec=none", "--workers=8", params=tmp_path / "shapes.json")
        assert "must be an object of shapes by path" in capsys.readouterr().err

    def test_it_runs_without_warnings(self):
        flags = ["--codec=none", "--workers=8", '--params={"w": [64, 32]}']
        got = subprocess.run(
            [sys.executable, "-W", "error", "-m", "gradcomp_jax.describe", *flags],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (got.returncode, got.stderr) == (0, "")
        assert got.stdout.startswith("leaf")


def test_the_page_shows_what_is_printed(capsys):
    """By its first block of Python, and by its command."""
    text = (pathlib.Path(__file__).parent.parent / "docs" / "describe.md").read_text()
    python, first, shell, second = re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)
    with jax.numpy_dtype_promotion("standard"):  # as a reader has it
        exec(compile(python, "docs/describe.md", "exec"), {})
    assert capsys.readouterr().out == first
    before = sum(x.nbytes for x in jax.live_arrays())
    _, _, module, *flags = shlex.split(shell)
    assert module == "gradcomp_jax.describe"
    command.main(flags)
    assert capsys.readouterr().out == second
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 2**20  # of 6.7e9 parameters


def test_more_elements_than_an_int32_counts():
    """Of all tensors of a coder that takes them together."""
    params = like({f"w{i}": (2**15, 2**15) for i in range(4)})
    totals = gcj.describe(gcj.qsgd(4), params, 8).totals
    assert totals.sent == 2 * 7 / 8 * 2**32 * (4 / 8 + 4 / 512)
    assert totals.packing == 0
