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
    """A codec between slices or nodes, whose chips are joined by a link that is fast.

    In each step the chips of a slice sum their gradients into shards, by a reduce-scatter; each exchanges its shard
    with those of the same place in the other slices, by the codec; and the chips join what they heard, by an
    all-gather. So with L chips in a slice each sends 1 / L of what the codec sends, over a slow link that they share,
    and has 1 / L of the codec's work and of its residual.

    A leaf is cut by rows, or as a vector where its rows do not divide; by columns for `onebit` and `adaptive`; by whole
    slices for `gradiveq`. What does not divide is filled up with zeros. Shards are compressed by themselves, but
    `powersgd` has one Q for the whole matrix and sends r (n + m) / L numbers, and `gradiveq` one basis; both give the
    means that they give without `across`. `min_size`, `compress` and a codec's own rule are asked about the whole leaf.
    A leaf of which a shard would not shrink is sent dense, and so are leaves that are not compressed: 1 / L from each
    chip.

    Args:
      codec: a codec, such as `qsgd(4)`; its axis_name is left out, or is `slow`.
      slow: the mesh axis, or axes, of the slices or nodes.
      fast: the mesh axis, or axes, of the chips in each.
      inside: whether gradients come whole, each chip's own, so that they are summed and joined inside. False: they are
        shards, as where parameters lie in shards over `fast` and a loss gathers them; the codec then runs on these, and
        gives shards. Or how the parameters lie, a tree of `PartitionSpec`s like them: leaves that it does not cut over
        `fast`, such as those that do not divide, come whole. Or (path, leaf) -> bool, whether a leaf does, where the
        others are cut along their first axis, or along the one behind the layers of powersgd's `stacked=`. Of leaves
        that come whole beside shards the chips' gradients are summed, as those of shards are. So the worker's gradient
        is the sum over its chips, and a loss that is a mean divides by their number. `powersgd` and `gradiveq` see
        shards with the axis that is cut in front, but for that of layers. `flush` is for whole parameters; of shards,
        what is owed at the end is what the codec's `update(zeros, state, flush=True)` gives in a step of your own.

    Returns:
      A `Compressor`, in the place of the codec. Its state is of shards; `init` makes it for a mesh.

    Raises:
      ValueError: codec is none, is on another axis, or is across slices already; slow and fast share an axis; or inside
        is none of these, or cuts a leaf otherwise than along one axis over all of fast.

    >>> import optax
    >>> from gradcomp_jax import across, qsgd
    >>> tx = optax.chain(across(qsgd(bits=4), slow="node", fast="local"), optax.sgd(0.1))
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
