"""One compiled program per codec and context, which returns all that the laws need.

A program runs a compressor over gradients [steps, workers, ...] and hands back, for every step and worker,
the updates and the state: replicated leaves too, so that a test can see whether they are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.sharding import is_per_worker

CONTEXTS = ("vmap", "pmap", "checked", "unchecked")
every_context = pytest.mark.parametrize("context", CONTEXTS)


class Run(NamedTuple):
    """What a run returns, as numpy arrays.

    Attributes:
      updates: [steps, workers, ...].
      states: CompressorState of [steps, workers, ...], after each step.
    """

    updates: Any
    states: Any


def scan_steps(tx, grads, state):
    """One worker's gradients [steps, ...] through `tx`."""

    def body(state, g):
        updates, state = tx.update(g, state)
        return state, (updates, state)

    return lax.scan(body, state, grads)[1]


def run(tx: gc.Compressor, grads: Any, context: str, state: Any = None) -> Run:
    """Runs `tx` over grads [steps, workers, ...] in a context; `state` is a global one to start from."""
    leaves, treedef = jax.tree.flatten(grads)
    workers = leaves[0].shape[1]
    if state is None:
        state = _first_state(tx, treedef, tuple((x.shape[2:], x.dtype) for x in leaves), workers)
    out = _program(tx, context, workers)(grads, state)
    # Programs put the workers first.
    return Run(*jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), out))


@functools.cache
def _first_state(tx, treedef, leaves, workers):
    return gc.init(tx, jax.tree.unflatten(treedef, [jnp.zeros(*leaf) for leaf in leaves]), workers)


@functools.cache
def _program(tx: gc.Compressor, context: str, workers: int):
    def worker(grads, state):
        return scan_steps(tx, grads, state)

    def axes(state):
        mark = lambda x: jax.tree.map(lambda _: 0, x) if is_per_worker(x) else None  # noqa: E731
        return jax.tree.map(mark, state, is_leaf=is_per_worker)

    if context == "vmap":
        return jax.jit(lambda grads, state: jax.vmap(worker, in_axes=(1, axes(state)), axis_name="data")(grads, state))
    if context == "pmap":
        return lambda grads, state: jax.pmap(
            worker, in_axes=(1, axes(state)), axis_name="data", devices=jax.devices()[:workers]
        )(grads, state)

    def sharded(grads, state):
        grads = jax.tree.map(lambda x: x[:, 0], grads)
        return jax.tree.map(lambda x: x[None], worker(grads, gc.local_state(state)))

    def program(grads, state):
        specs = jax.tree.map(
            lambda x: jax.tree.map(lambda _: P("data"), x) if is_per_worker(x) else P(),
            state,
            is_leaf=is_per_worker,
        )
        return jax.shard_map(
            sharded,
            mesh=gc.make_mesh(workers),
            in_specs=(P(None, "data"), specs),
            out_specs=P("data"),
            check_vma=context == "checked",
        )(grads, state)

    return jax.jit(program)
