"""The table of what a worker sends is what the codecs send."""

import jax
import pytest

from experiments import wire
from gradcomp_jax import gradiveq, none, onebit, powersgd, qsgd, wire_bits
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run

SHAPES = {"a": (3, 3, 16, 32), "b": (32,)}


def sent(codec, workers):
    """MB, by a step that runs; of GradiVeQ, one that compresses."""
    states = run(codec, trees.noise(SHAPES, 0, (3 if codec.codec.name == "gradiveq" else 1, workers)), "vmap").states
    return wire_bits(jax.tree.map(lambda x: x[-1], states)).last / 8e6


@pytest.mark.parametrize(
    "codec",
    [
        powersgd(2),
        onebit(),
        qsgd(min_size=0, aggregate="shuffle"),
        gradiveq(8, train_steps=2, compress_steps=5, warmup_steps=0),
    ],
    ids=lambda codec: codec.codec.name,
)
def test_what_is_traced_is_what_a_step_sends(codec):
    assert wire.sent(codec, SHAPES, 4) == sent(codec, 4)


@pytest.mark.parametrize("make", [powersgd, qsgd, onebit, gradiveq], ids=lambda make: make.__name__)
def test_what_is_not_compressed_counts(make):
    codec = make(min_size=10_000, allow_dense=True)
    assert wire.sent(codec, SHAPES, 4) == wire.sent(none(), SHAPES, 4) == 2 * 3 / 4 * 4 * (3 * 3 * 16 * 32 + 32) / 1e6


def test_the_star_is_at_what_the_codec_chooses(monkeypatch):
    chosen = {name: wire.CODECS[name] for name in ("none", "onebit")}
    monkeypatch.setattr(wire, "CODECS", chosen)
    dense, gather, shuffle = wire.rows(SHAPES, (2, 8))
    assert dense[:2] == ["none", "psum"]
    assert "*" not in "".join(dense)
    assert [cell.endswith("*") for cell in gather[2:]] == [True, False]
    assert [cell.endswith("*") for cell in shuffle[2:]] == [False, True]
    for workers, cells in zip((2, 8), zip(gather[2:], shuffle[2:], strict=True), strict=True):
        (best,) = [float(cell[:-2]) for cell in cells if cell.endswith("*")]
        assert best == pytest.approx(wire.sent(onebit(), SHAPES, workers), abs=0.006)
