"""No compression: the baseline that is counted like any codec, and the exact mean over a fast axis."""

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

    It takes the keywords that every codec takes, so that one call serves them all. 16-bit gradients are summed, and
    travel, in float32; with dense_dtype="bfloat16" in bfloat16, as by `jax.lax.pmean` of such gradients.

    Args:
      aggregate: "psum", or "ring" for an all-reduce of our own, hop by hop.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: keeps a residual: zero, but for what rounding to 16 bits takes away, of the mean and before.
      seed: without effect.
      min_size: smaller leaves have no residual.
      compress: (path, leaf) -> whether it has a residual; by default every leaf.
      allow_dense: without effect: all is dense.
      dense_dtype: the type in which gradients travel and are summed, "bfloat16" or "float16" (beyond whose range they
        are cut off); by default float32 or wider. CPUs sum bfloat16 in float32, which then travels and counts.
      buckets: in how many parts the exchange goes, each with messages of its own as soon as its gradients are there; or
        (path) -> the number of a leaf's part, of which lower ones go first. By default see `compressor`.

    Returns:
      A `Compressor` whose updates are the mean gradients.

    >>> import optax
    >>> from gradcomp_jax import none
    >>> tx = optax.chain(none(), optax.sgd(0.1))
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

    With mesh axes ("node", "local"), `optax.chain(average("local"), powersgd(axis_name="node"), ...)`
    reduces exactly inside a node and compresses between nodes, where every device sends the whole payload: `across` has
    each send its share. What is sent here is not counted by `wire_bits`, which speaks of the slow axis.

    Args:
      axis_name: the fast axis, or axes.

    Returns:
      A stateless transformation. Its update raises ValueError where the axis is not bound, and for
      gradients that are already reduced, where types are tracked.
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
