"""No compression: the baseline, counted like any codec, and the exact mean over a fast axis."""

from typing import Any

import jax
import optax
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Predicate, Uncompressed
from gradcomp_jax.exchange import ways
from gradcomp_jax.exchange.collectives import Wire, require_local
from gradcomp_jax.exchange.plan import Settings, flatten, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.views import widen


@factory
def none(
    *,
    aggregate: str = "psum",
    axis_name: AxisName = "data",
    error_feedback: bool | Feedback | EF21 = False,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """All-reduces every gradient as it is: the dense baseline, with its bits counted.

    It takes the keywords of every codec, so one call serves them all. 16-bit gradients are summed, and travel, in
    float32. With dense_dtype="bfloat16" they are summed, and travel, in bfloat16, like with `jax.lax.pmean`.

    Args:
      aggregate: "psum", or "ring" for an all-reduce of our own, hop by hop.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: keeps a residual; it holds only the rounding to 16 bits, of the mean and before.
      seed: without effect.
      min_size: smaller leaves have no residual.
      compress: (path, leaf) -> whether it has a residual; by default every leaf.
      allow_dense: without effect: all is dense.
      dense_dtype: the type in which gradients travel and are summed, "bfloat16" or "float16"; by default float32 or
        wider. Values beyond float16's range are cut off. CPUs sum bfloat16 in float32, which then travels and counts.
      buckets: the number of parts of the exchange. Each sends messages of its own once its gradients are there. Or
        (path) -> the number of a leaf's part; lower numbers go first. For the default see `compressor`.

    Returns:
      A `Compressor` whose updates are the mean gradients.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.none(), optax.sgd(0.1))
    """
    del seed, allow_dense
    require_aggregate("none", None, aggregate)
    return compressor(
        Uncompressed(),
        Settings(axis_name, feedback(error_feedback), min_size, compress, True, aggregate, dense_dtype, buckets),
    )


@factory
def average(axis_name: AxisName) -> optax.GradientTransformation:
    """The exact mean over a fast mesh axis, to stand before a codec on the slow one.

    With mesh axes ("node", "local"), `optax.chain(average("local"), powersgd(axis_name="node"), ...)` reduces exactly
    inside a node and compresses between nodes. Every device then sends the whole payload; with `across` each sends its
    share. `wire_bits` speaks of the slow axis, and does not count `average`.

    Args:
      axis_name: the fast axis, or axes.

    Returns:
      A stateless transformation. Its update raises ValueError if the axis is not bound. It raises ValueError for
      gradients that are already reduced, if types are tracked.
    """

    def update_fn(updates: Any, state: optax.EmptyState, params: Any = None):
        del params
        wire = Wire(axis_name)
        assert wire.workers
        leaves, treedef = flatten(updates)
        require_local(list(leaves.items()), axis_name)
        sent = ways.exact([], [widen(x) for x in leaves.values()], wire, [], ring=False, before=None)
        means = [mean.astype(x.dtype) for mean, x in zip(sent.rode, leaves.values(), strict=True)]
        return jax.tree.unflatten(treedef, means), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)
