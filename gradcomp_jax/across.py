"""Between slices or nodes: each of their chips compresses and sends its share."""

from typing import Any

from gradcomp_jax.arguments import factory, shown, takes
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Predicate
from gradcomp_jax.exchange.collectives import axis_names
from gradcomp_jax.exchange.plan import axes_of


@factory
def across(
    codec: Compressor, slow: AxisName = "node", fast: AxisName = "local", *, inside: bool | Predicate | Any = True
) -> Compressor:
    """A codec between slices or nodes whose chips share a fast link.

    A step has three stages. The chips of a slice sum their gradients into shards, with a reduce-scatter. Each chip
    exchanges its shard with the chips of the same place in the other slices, with the codec. The chips join the means,
    with an all-gather. With L chips in a slice, each sends 1 / L of the codec's bytes over the slow link that they
    share, and has 1 / L of the codec's work and of its residual.

    A leaf is cut by rows, or like a vector if its rows do not divide. `onebit` and `adaptive` cut it by columns, and
    `gradiveq` by whole slices. A leaf that does not divide is filled up with zeros. Each shard is compressed on its
    own, with two exceptions: `powersgd` has one Q for the whole matrix and sends r (n + m) / L numbers, and `gradiveq`
    has one basis. Both give the means that they give without `across`. `min_size`, `compress` and a codec's own rule
    see the whole leaf. A leaf whose shard would not shrink is sent dense. Each chip sends 1 / L of the dense leaves.

    Args:
      codec: a codec, such as `qsgd(4)`; leave its axis_name out, or give `slow`.
      slow: the mesh axis, or axes, of the slices or nodes.
      fast: the mesh axis, or axes, of the chips in each.
      inside: how gradients come. True: whole, each chip's own; they are then summed and joined inside. False: in
        shards, if parameters lie in shards over `fast` and the loss gathers them; the codec then runs on shards, and
        gives shards. Or the parameters' layout, a tree of `PartitionSpec`s like them: leaves that it does not cut over
        `fast`, such as those that do not divide, come whole. Or (path, leaf) -> bool, whether a leaf comes whole; the
        others are cut along their first axis, or along the axis behind the layers of powersgd's `stacked=`. Beside
        shards, the chips' gradients of whole leaves are summed too. So the worker's gradient is the sum over its chips,
        and a loss that is a mean divides by their number. `powersgd` and `gradiveq` see shards with the cut axis in
        front, behind the axis of layers. `flush` is for whole parameters. For shards, the codec's
        `update(zeros, state, flush=True)` in a step of your own gives the debt at the end.

    Returns:
      A `Compressor`, to use instead of the codec. Its state holds shards; `init` makes it for a mesh.

    Raises:
      ValueError: codec is no codec, is on another axis, or is across slices already; slow and fast share an axis;
        inside is none of these; or inside cuts a leaf in another way than along one axis over all of fast.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.across(gcj.qsgd(bits=4), slow="node", fast="local"), optax.sgd(0.1))
    """
    if not isinstance(codec, Compressor):
        raise ValueError(f"codec={shown(codec)} must be a codec, as in across(qsgd(4), slow='node', fast='local')")
    settings = codec.settings
    if settings.fast is not None:
        raise ValueError(f"codec is across {settings.fast!r} already: give across the codec itself")
    if settings.axis_name not in ("data", slow):
        raise ValueError(f"axis_name={settings.axis_name!r} of the codec must be slow={slow!r}: leave it out there")
    if set(axis_names(slow)) & set(axis_names(fast)):
        raise ValueError(f"slow={slow!r} and fast={fast!r} must be different axes of the mesh")
    if not isinstance(inside, bool) and not takes(inside, 2):
        inside = axes_of(inside, slow, fast)
    return compressor(codec.codec, settings._replace(axis_name=slow, fast=fast, inside=inside))
