"""Checkpoints of an older version are restored, and training goes on from them as that one's did.

They are of commit 47fbcf7, each after seven steps, with the parameters that it came to from there: by three steps more;
of codecs that draw, for which other numbers are drawn now, by `flush`, which sends what they owe.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gradcomp_jax as gc

FOLDER = pathlib.Path(__file__).parent / "old_checkpoints"
WORKERS = 2


def matrices(path, leaf):
    return leaf.ndim == 2


CYCLE = {"train_steps": 5, "compress_steps": 6, "warmup_steps": 1, "compress": matrices}
CODECS = {
    "none": lambda: gc.none(),
    "powersgd": lambda: gc.powersgd(rank=2),
    "powersgd-qsgd": lambda: gc.powersgd(2, quantizer=gc.qsgd(8, aggregate="gather")),
    "qsgd-elias": lambda: gc.qsgd(4, min_size=0, bucket_size=64, norm="l2", code="elias", error_feedback=True),
    "gradiveq": lambda: gc.gradiveq(16, ratio=4, **CYCLE),
    "gradiveq-holdout": lambda: gc.gradiveq(16, select="holdout", max_loss=0.9, **CYCLE),
    "onebit": lambda: gc.onebit(second_residual=True),
    "adaptive": lambda: gc.adaptive(proportion=8),
    "topk": lambda: gc.topk(0.1),
    "randomk": lambda: gc.randomk(0.1),
    "randomblock": lambda: gc.randomblock(0.1),
    "signnorm": lambda: gc.signnorm(),
    "accordion": lambda: gc.accordion(gc.powersgd(2), gc.powersgd(1), interval=2),
    "delayed": lambda: gc.delayed(gc.onebit()),
}


DRAWING = ("powersgd-qsgd", "qsgd-elias", "randomk", "randomblock")


def optimizer(name):
    return optax.chain(CODECS[name](), optax.sgd(0.1, momentum=0.9))


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["layer1"]["kernel"] + params["layer1"]["bias"][None])
    return jnp.mean((hidden @ params["layer2"]["kernel"] - batch["y"]) ** 2)


def beginning(name):
    shapes = {"layer1": {"kernel": (64, 4), "bias": (4,)}, "layer2": {"kernel": (4, 64)}}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return {"params": params, "opt_state": gc.init(optimizer(name), params, WORKERS)}


def train(name, state, batches):
    step = gc.simulate(loss_fn, optimizer(name), WORKERS)
    params, opt_state = state["params"], state["opt_state"]
    for batch in batches:
        params, opt_state, _ = step(params, opt_state, batch)
    return {"params": params, "opt_state": opt_state}


def arrays(file):
    """The tree of an .npz file, of which keys are paths."""
    with np.load(FOLDER / file) as leaves:
        tree = {}
        for path, leaf in leaves.items():
            *parents, key = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[key] = jnp.asarray(leaf)
    return tree


def both_leaves(first, second):
    return zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)


def test_every_checkpoint_is_restored():
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(CODECS)


@pytest.mark.parametrize("name", CODECS)
@jax.numpy_dtype_promotion("standard")  # which optax needs
def test_restored_training_goes_on_as_the_old_code_did(name):
    target = jax.eval_shape(lambda: beginning(name))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(FOLDER / name / "state", target)
    stored = arrays("batches.npz")
    batches = [{"x": x, "y": y} for x, y in zip(stored["x"], stored["y"], strict=True)]
    got = train(name, state, batches)["params"]
    if name in DRAWING:
        assert all(np.isfinite(a).all() and (a != b).any() for a, b in both_leaves(got, state["params"]))
        got, _ = gc.flush(optimizer(name), state["params"], state["opt_state"], WORKERS)
    for a, b in both_leaves(got, arrays(f"{name}/expected.npz")):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
