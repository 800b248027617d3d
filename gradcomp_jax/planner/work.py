"""The work of a step and of an exchange on one device: as compiled programs, to be timed here or to be counted.

Nothing is sent. An exchange is compiled for one worker, whose collectives move nothing. What more it does among n
workers is compiled beside it: with codes that are gathered, a worker decodes n - 1 further payloads; with codes that
are shuffled or go round a ring, about one further payload.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from gradcomp_jax import known
from gradcomp_jax.agreement import update_of
from gradcomp_jax.describe import Description
from gradcomp_jax.describe.dry import Workers, dry_run
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.exchange.shards import add_each, encode_each, grouped, row
from gradcomp_jax.exchange.shares import Round
from gradcomp_jax.notes import quiet
from gradcomp_jax.outer import Outer
from gradcomp_jax.planner.cost import Talk
from gradcomp_jax.planner.targets import Device


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      function: a jitted function.
      arguments: a random key -> its arguments; the first is given away, and replaced by the first result.
      times: how often it runs in an exchange.
    """

    function: Any
    arguments: Callable[[jax.Array], tuple[Any, ...]]
    times: float

    def counted(self, device: Device) -> float:
        """The seconds on a device that need not be here: from XLA's counts, of the program as compiled here."""
        with quiet():
            compiled = self.function.lower(*jax.eval_shape(self.arguments, jax.random.key(0))).compile()
        cost = compiled.cost_analysis() or {}
        return self.times * device.codec_seconds(cost.get("flops", 0.0), cost.get("bytes accessed", 0.0))

    def timed(self, repeats: int) -> float:
        """The seconds here: the median of some runs."""
        with quiet():
            given, *others = jax.block_until_ready(jax.jit(self.arguments)(jax.random.key(0)))
            given, *_ = jax.block_until_ready(self.function(given, *others))  # compiles
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            given, *_ = jax.block_until_ready(self.function(given, *others))
            seconds.append(time.perf_counter() - began)
        return self.times * statistics.median(seconds)


def local_step(
    loss_fn: Callable[[Any, Any], Any], optimizer: optax.GradientTransformation, params: Any, batch: Any
) -> Program:
    """A step of one device on its part of the batch, without any exchange."""

    def step(held: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, state = held
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    copied = lambda: jax.tree.map(lambda x: jnp.array(x, copy=True), params)  # noqa: E731
    return Program(jax.jit(step, donate_argnums=0), lambda _: ((copied(), optimizer.init(params)), batch), 1.0)


def operations(loss_fn: Callable[[Any, Any], Any], params: Any, batch: Any) -> float:
    """The floating-point operations of a loss and its gradients, as XLA counts them.

    Raises:
      ValueError: there is a loop, of which XLA counts one turn.
    """
    traced = jax.jit(jax.value_and_grad(loss_fn)).trace(params, batch)
    if any(x.primitive.name in ("scan", "while") for x in known.equations(traced.jaxpr.jaxpr)):
        raise ValueError(
            "loss_fn has a loop, such as jax.lax.scan over layers, of which XLA counts a single turn: give the seconds "
            "of a local step, step_seconds="
        )
    cost = traced.lower().cost_analysis() or {}
    return float(cost["flops"])


def absent(workers: int, devices: int, platform: str) -> AbstractMesh:
    """A mesh without devices: workers along "data", or along "node" with so many devices each along "local"."""
    axes = {"node": workers, "local": devices} if devices > 1 else {"data": workers}
    kind = AbstractDevice(platform, None, platform)
    automatic = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=automatic, abstract_device=kind)


def talks(told: Description) -> tuple[list[Talk], list[Talk]]:
    """The collectives of an exchange on an `absent` mesh: those between workers, and those inside a worker."""
    found: tuple[list[Talk], list[Talk]] = ([], [])
    slow = next(iter(told.workers))
    for x in told.collectives:
        n = math.prod(told.workers[axis] for axis in x.axes)
        # On CPUs each operand is a message of its own; elsewhere those of one collective travel together.
        on_cpus = told.platform == "cpu"
        found[slow not in x.axes].append(Talk(x.kind, x.bytes, n, x.times if on_cpus else x.calls, not on_cpus))
    return found


def codec_seconds(
    tx: optax.GradientTransformation, params: Any, workers: Workers, device: Device | None, repeats: int = 1
) -> float:
    """The seconds that a device spends on the codec in an exchange; without `device` they are timed here."""
    few, times = reduced(params)
    try:
        programs = exchange(tx, few, workers)
    except ValueError:  # such as a rule by paths that nothing of the reduced tree follows
        programs, times = exchange(tx, params, workers), 1.0
    return times * math.fsum(x.timed(repeats) if device is None else x.counted(device) for x in programs)


def reduced(params: Any) -> tuple[Any, float]:
    """One leaf of each shape and type, by path; and how many times more elements the whole tree has."""
    leaves, _ = flatten(params)
    first = {(x.shape, x.dtype): path for path, x in reversed(leaves.items())}
    kept = {path: x for path, x in leaves.items() if first[x.shape, x.dtype] == path}
    count = lambda tree: sum(x.size for x in tree.values())  # noqa: E731
    return kept, count(leaves) / max(1, count(kept))


def exchange(tx: optax.GradientTransformation, params: Any, workers: Workers) -> list[Program]:
    """An exchange of one device among so many workers: what it does for itself, and what it decodes of the others."""
    dry = dry_run(tx, params, workers)
    here = np.array(jax.local_devices()[:1]).reshape((1,) * len(dry.mesh.axis_names))
    mesh = Mesh(here, dry.mesh.axis_names)
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)

    def step(state: Any, grads: Any, params: Any) -> Any:
        if isinstance(tx, Outer):
            fragments = range(tx.method.period(params).fragments)
            return tx.method.exchanged(fragments, params, state, jnp.array(True))
        updates, state = update_of(tx, mesh.shape, grads, state, params, jnp.float32(0))
        return state, updates

    def arguments(key: jax.Array) -> tuple[Any, Any, Any]:
        values = noise(params, key)
        return on_mesh(tx.init)(values), values, values

    programs = [Program(jax.jit(on_mesh(step), donate_argnums=0), arguments, 1 / dry.chips_of(dry.called[0]))]
    for rounds, called in zip(dry.rounds, dry.called, strict=True):
        n = dry.workers_of(called)
        for _, one in rounds:
            if one.coder is not None and one.route is not None and n > 1:
                programs.append(_further(one, n - 1 if one.route.way == "gather" else 1))
    return programs


def noise(params: Any, key: jax.Array) -> Any:
    """Random values of these shapes and types."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [0.01 * jax.random.normal(k, x.shape, jnp.float32) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [d.astype(x.dtype) for d, x in zip(drawn, leaves, strict=True)])


def _further(said: Round, times: int) -> Program:
    """Adds what another worker's codes stand for."""
    words = [jax.ShapeDtypeStruct(word.shape, jnp.float32) for word in said.coded]

    def groups(xs: Sequence[Any], key: Any) -> Any:
        ys = said.coder.lay_all(xs)
        strengths: Sequence[Any] = [word.strength or 0 for word in said.coded][: len(ys)]
        return grouped(said.coder, ys, 1, key, strengths, draws=key is not None)

    def decode(totals: Any, messages: Any) -> tuple[Any, ...]:
        return (add_each(groups([jnp.zeros(x.shape, x.dtype) for x in words], None), totals, messages, 2),)

    def arguments(key: jax.Array) -> tuple[Any, Any]:
        made = groups(noise(words, key), key)
        return [list(group.ys) for group in made], [row(message, 0) for message in encode_each(made)]

    return Program(jax.jit(decode, donate_argnums=0), arguments, times)
