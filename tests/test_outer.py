"""Outer steps: against the papers' algorithms in numpy, in each form of a step, and when something goes wrong."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gcj
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
