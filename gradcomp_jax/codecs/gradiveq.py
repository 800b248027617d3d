"""GradiVeQ: slices of the gradient in the basis of their principal components, summed in compressed form.

Yu et al., "GradiVeQ: Vector Quantization for Bandwidth-Efficient Gradient Aggregation in Distributed CNN
Training", NeurIPS 2018, arXiv 1811.03617. A convolution's kernel, walked filter first, then depth, width and
height, is cut into slices g_m of K values. In cycles of steps, with the means over N workers where the paper
has sums:

    L_t steps:  mean of g_m dense; the slices are samples     mu_m <- their mean
                U (K x d) <- top d principal components of the first slice's L_t samples
    L_c steps:  g'_{n,m} = U^T g_{n,m}                         compress (eq. 4)
                g'_m = mean over n of g'_{n,m}                 the all-reduce: d floats a slice
                mean_m = U (g'_m - U^T mu_m) + mu_m            decompress (eq. 5)

which is the paper's U U^T (g_m - mu_m) + mu_m without a gradient-sized difference. The compression is linear,
so nothing is decompressed before the sum. A warm-up of dense steps comes before the first cycle.

Where the paper leaves room: all slices of a layer share the U of the first (its reuse factor s at infinity,
see `reuse`), but each has its own mu. U is computed from the L_t x L_t Gram matrix of the samples by eigh and QR
(dividing by the eigenvalues instead loses orthogonality in float32), with the largest entry of each column made
positive, and taken from the first worker, as unlike processors may order close eigenvalues differently.

The rank trap: L_t samples span at most L_t - 1 directions, so at L_t = 100 and K = 768 the paper's rule, to
keep 99 % of the samples' variance, allows a ratio of 7.8 for any data, even noise, of which fresh gradients
then lose nearly all. `select="holdout"` measures the loss on samples that the basis has not seen.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradcomp_jax import collectives
from gradcomp_jax.aggregation import linear
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import (
    Codec,
    Compressor,
    Exchanged,
    Levels,
    Predicate,
    Tensors,
    compressor,
    require_static,
    require_whole,
)
from gradcomp_jax.levels import mean_of_fronts
from gradcomp_jax.metrics import bit_pair, sum_bits
from gradcomp_jax.views import buckets, from_buckets

SELECT = ("ratio", "energy", "holdout")
# K / d on the rungs from which "energy" and "holdout" choose.
RATIOS = (32, 16, 8, 4)


class GradiVeQState(NamedTuple):
    """State of `gradiveq`, the same on all workers; arrays are by leaf path.

    Attributes:
      position: int32, in the cycle: below 0 in dense steps that are no samples (the warm-up), then the row of
        the next sample, and from L_t on in compressed steps.
      samples: aggregated first slices of each group in the training steps, [L_t, groups, K].
      mu: each slice's mean over the training steps, [slices, K].
      basis: U, [groups, K, d]; on a ladder d is that of the widest rung.
      projected: U^T mu, [slices, d].
      rung: int32, the place on the ladder of `select`; empty for "ratio".
      loss: |own - gradient|^2 / |gradient|^2 in the last compressed step (eq. 7), mean over the workers; 0 for a
        gradient of zeros. Without what a quantizer loses.
      quantizer: the quantiser's state; empty without one.
    """

    position: jax.Array
    samples: Tensors
    mu: Tensors
    basis: Tensors
    projected: Tensors
    rung: Tensors
    loss: Tensors
    quantizer: Any


class Layout(NamedTuple):
    """How a leaf is cut.

    Attributes:
      k: K, the length of a slice.
      slices: how many there are; the last one is padded with zeros.
      groups: how many bases they have.
      widths: the d of each rung, ascending; below the number of samples.
    """

    k: int
    slices: int
    groups: int
    widths: tuple[int, ...]

    @property
    def reuse(self) -> int:
        """Slices to a basis."""
        return -(-self.slices // self.groups)


def slice_length(shape: tuple[int, ...], k_max: int = 768) -> int:
    """K for a leaf of this shape [..., D, F]: a multiple of F D that tiles it, where that is at most k_max.

    At multiples of F D, the values at one spatial position, the loss drops sharply (Fig. 5). Where F D is
    larger, K is the largest multiple of F that tiles the leaf, and where F is larger, the largest divisor of F;
    where F is a prime K is k_max, and the last slice is not full. Slices shorter than D F begin at different
    depths, and the first one's basis fits those at another depth less.
    """
    size = math.prod(shape)
    for unit in (math.prod(shape[-2:]), math.prod(shape[-1:])):
        fitting = [k for k in range(unit, k_max + 1, unit) if size % k == 0]
        if fitting:
            return fitting[-1]
    return max((k for k in range(2, k_max + 1) if shape[-1] % k == 0), default=k_max)


def principal_basis(samples: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """The top d principal components of samples [L, K], as columns [K, d], and all variances [L], descending.

    Columns are orthonormal; those whose variance is rounding are zero. d is at most min(L, K). Variances are
    relative to the square of the largest sample.
    """
    largest = jnp.max(jnp.abs(samples))
    x = samples / jnp.where(largest > 0, largest, 1)  # sums and squares of samples may leave their type's range
    x = x - jnp.mean(x, axis=0)
    variance, v = jnp.linalg.eigh(_matmul(x, x.T))
    variance, v = jnp.maximum(variance[::-1], 0), v[:, ::-1]
    u, _ = jnp.linalg.qr(_matmul(x.T, v[:, :d]))
    carries = variance[:d] > len(x) * jnp.finfo(x.dtype).eps * variance[0]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)
    return jnp.where(carries, u * jnp.where(largest < 0, -1, 1).astype(u.dtype), 0), variance


def unexplained(samples: jax.Array, basis: jax.Array, mu: jax.Array) -> jax.Array:
    """|x - xhat|^2 / |x|^2 over samples x [L, K], by how many columns of the basis [K, d] are kept: [d].

    xhat = U U^T (x - mu) + mu. Ones where the samples are all zero.
    """
    largest = jnp.max(jnp.abs(samples))
    scale = jnp.where(largest > 0, largest, 1)
    x, centred = samples / scale, (samples - mu) / scale
    kept = jnp.cumsum(jnp.sum(_matmul(centred, basis) ** 2, axis=0))
    return jnp.where(largest > 0, jnp.maximum(jnp.sum(centred**2) - kept, 0) / jnp.sum(x**2), 1)


def project(rows: jax.Array, basis: jax.Array) -> jax.Array:
    """U^T g of every slice: rows [slices, K], basis [groups, K, d] -> [slices, d]."""
    return _matmul(_grouped(rows, len(basis)), basis).reshape(-1, basis.shape[-1])[: len(rows)]


def restore(c: jax.Array, basis: jax.Array, projected: jax.Array, mu: jax.Array) -> jax.Array:
    """U (c - U^T mu) + mu of every slice: c [slices, d] -> [slices, K]; uses the first d columns of U."""
    d = c.shape[-1]
    rows = _matmul(_grouped(c - projected[:, :d], len(basis)), basis[..., :d].swapaxes(1, 2))
    return rows.reshape(-1, mu.shape[-1])[: len(mu)] + mu


def _grouped(rows: jax.Array, groups: int) -> jax.Array:
    """[slices, ...] -> [groups, slices of one basis, ...], filled up with zeros."""
    size = -(-len(rows) // groups)
    missing = groups * size - len(rows)
    rows = jnp.pad(rows, [(0, missing), (0, 0)]) if missing else rows
    return rows.reshape(groups, size, -1)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    # HIGHEST: TPUs round to bfloat16 by default, and own and mean would part.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def gradiveq(
    k: int | None = None,
    *,
    ratio: float = 8,
    train_steps: int = 100,
    compress_steps: int = 400,
    warmup_steps: int = 2500,
    k_max: int = 768,
    reuse: int | None = None,
    select: str = "ratio",
    max_loss: float = 0.01,
    aggregate: str = "psum",
    quantizer: Compressor | None = None,
    quantize_coefficients: bool = True,
    axis_name: AxisName = "data",
    error_feedback: bool = False,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
) -> Compressor:
    """GradiVeQ (Yu et al., NeurIPS 2018), linear, by one all-reduce in the compressed space.

    Steps go in cycles, after `warmup_steps` dense ones: `train_steps` dense ones on which the bases are fitted,
    on the last of which the first worker sends them, then `compress_steps` that send d = K / ratio floats for each
    slice of K, and one a leaf for the loss, which the state tells. A skipped step does not count. So the bytes of a
    run are those of its phases, and a run shorter than the warm-up is not compressed at all.

    State, the same on all workers, in the gradient's type (float32 or wider): mu, of the size of the compressed
    leaves; for each basis `train_steps` K floats of samples and K d floats of U; d floats a slice. With the
    defaults that is 1.35 times ResNet-18's compressed leaves.

    Args:
      k: K, the length of a slice, at most the leaf's size; the last slice is padded with zeros. By default
        `slice_length` of each leaf: multiples of D F elements, one position of a kernel [H, W, D, F].
      ratio: K / d, above 1, for select="ratio"; d must be below train_steps.
      train_steps: L_t, the dense steps of a cycle on which bases are fitted, at least 2.
      compress_steps: L_c, the compressed steps of a cycle.
      warmup_steps: dense steps before the first cycle.
      k_max: the largest K where k is None; costs 4 d flops an element to compress and restore.
      reuse: s, how many consecutive slices share one basis at most, computed from the first of them; by default
        all of a leaf. Groups are of one size, but for the last.
      select: "ratio"; or "energy", "holdout": at the end of each training phase, for each leaf, the smallest d of
        K/32, K/16, K/8, K/4 (but below the number of samples) that loses at most max_loss of the first slice of
        each group, else dense. "energy" is the paper's rule, the variance of the training samples themselves, and
        falls into the rank trap where K / train_steps is large; "holdout" fits on the first 4/5 of the samples and
        takes the squared relative loss on the others. What all slices lose is in the state's `loss`.
      max_loss: lambda, for "energy" and "holdout".
      aggregate: "psum", or "ring", the paper's Algorithm 1 hop by hop: what passes is added in compressed form.
      quantizer: a compressor, such as `qsgd(4)`, through whose codec the gradients of the training steps travel (the
        paper's experiments), and the coefficients of the compressed ones; for select="ratio". Not linear then.
      quantize_coefficients: whether the quantizer serves the compressed steps too, which the paper's does not.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: keep residuals, which the paper does not. What a basis leaves out waits for the end of its
        compressed steps; one more dense step, which is no sample, then sends it.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default, as in the paper, convolutions: leaves of
        four axes or more.
      allow_dense: accept a tree of which no leaf is compressed.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument out of range; in init, a leaf for which d is not below train_steps; later what
        `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import gradiveq
    >>> tx = optax.chain(gradiveq(ratio=8), optax.sgd(0.1, momentum=0.9))
    """
    del seed
    if k is not None:
        require_whole("k", k, 1)
    require_static("ratio", ratio)
    if not ratio > 1:
        raise ValueError(f"ratio={ratio} must be above 1, it is the K / d of a slice")
    if select not in SELECT:
        raise ValueError(f"select={select!r} must be one of {', '.join(map(repr, SELECT))}")
    # A fifth of the samples, at least one, is held out.
    require_whole("train_steps", train_steps, 5 if select == "holdout" else 2)
    require_whole("compress_steps", compress_steps, 1)
    require_whole("warmup_steps", warmup_steps, 0)
    require_whole("k_max", k_max, 1)
    if reuse is not None:
        require_whole("reuse", reuse, 1)
    if quantizer is not None and select != "ratio":
        raise ValueError(
            f"select={select!r} goes without a quantizer: what it loses would be taken for the basis's loss"
        )
    if not 0 < max_loss < 1:
        raise ValueError(f"max_loss={max_loss} must be above 0 and below 1")
    fitted = train_steps - train_steps // 5 if select == "holdout" else train_steps
    reduce = linear("gradiveq", aggregate, quantizer, axis_name)

    def is_convolution(path: str, leaf: Any) -> bool:
        del path
        return leaf.ndim >= 4

    def build(ratios: tuple[float, ...], error_feedback: bool) -> Codec:
        """The codec of some ratios, among which `level` chooses for each leaf where there are several."""
        # Leaves differ in the d that they send.
        ladder = select != "ratio" or len(ratios) > 1
        # With error feedback, a cycle begins by sending what the last one owes.
        settling = int(error_feedback)

        def layout(path: str, leaf: Any) -> Layout:
            length = min(leaf.size, k or slice_length(leaf.shape, k_max))
            slices = -(-leaf.size // length)
            groups = -(-slices // min(slices, reuse or slices))
            if select != "ratio":
                chosen = {max(1, min(length // r, fitted - 1)) for r in RATIOS}
                return Layout(length, slices, groups, tuple(sorted(chosen)))
            widths = {ratio: max(1, int(length / ratio)) for ratio in ratios}
            for ratio, d in widths.items():
                if d > train_steps - 1:
                    raise ValueError(
                        f"leaf {path!r}: K={length} at ratio={ratio} keeps d={d} directions, but "
                        f"train_steps={train_steps} samples span {train_steps - 1} only: use train_steps={d + 1} or "
                        "more, a larger ratio, or a smaller k or k_max"
                    )
            return Layout(length, slices, groups, tuple(sorted(widths.values())))

        def shrinks(path: str, leaf: Any) -> bool:
            if not leaf.size:
                return False
            cut = layout(path, leaf)
            return cut.slices * cut.widths[0] + 1 < leaf.size

        def init(tensors: Tensors) -> GradiVeQState:
            def zeros(shape) -> Tensors:
                cuts = {path: layout(path, x) for path, x in tensors.items()}
                return {path: jnp.zeros(shape(cut), tensors[path].dtype) for path, cut in cuts.items()}

            return GradiVeQState(
                position=jnp.int32(-warmup_steps - settling),
                samples=zeros(lambda cut: (train_steps, cut.groups, cut.k)),
                mu=zeros(lambda cut: (cut.slices, cut.k)),
                basis=zeros(lambda cut: (cut.groups, cut.k, cut.widths[-1])),
                projected=zeros(lambda cut: (cut.slices, cut.widths[-1])),
                rung={path: jnp.int32(0) for path in tensors} if select != "ratio" else {},
                loss=zeros(lambda cut: ()),
                quantizer=reduce.init({}),
            )

        def fit_leaf(samples: jax.Array, widths: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
            """U [groups, K, d] and the rung."""

            def fit_group(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
                basis, variance = principal_basis(samples[:fitted], widths[-1])
                if select == "holdout":
                    lost = unexplained(samples[fitted:], basis, jnp.mean(samples[:fitted], axis=0))
                else:
                    total = jnp.sum(variance)
                    lost = jnp.where(total > 0, 1 - jnp.cumsum(variance) / jnp.where(total > 0, total, 1), 1)
                return basis, lost[jnp.array(widths, jnp.int32) - 1]

            # One after another: a batched eigh on emulated devices can deadlock in XLA's thread pool.
            basis, lost = lax.map(fit_group, samples.swapaxes(0, 1))
            enough = jnp.append(jnp.max(lost, axis=0) <= max_loss, True)
            return basis, jnp.argmax(enough).astype(jnp.int32)

        def exchange(
            tensors: Tensors,
            state: GradiVeQState,
            axis_name: AxisName,
            *,
            level: dict[str, jax.Array] | None = None,
            **extra_args: Any,
        ) -> Exchanged:
            cuts = {path: layout(path, x) for path, x in tensors.items()}
            position = state.position
            # The place of a leaf's d among its widths, which ascend while ratios, hence levels, fall.
            rung = state.rung if level is None else {path: len(ratios) - 1 - x for path, x in level.items()}
            exact = linear("gradiveq", aggregate)

            def decode(c: Tensors) -> Tensors:
                rows = {p: restore(x, state.basis[p], state.projected[p], state.mu[p]) for p, x in c.items()}
                return {path: from_buckets(x, tensors[path].shape) for path, x in rows.items()}

            def dense(reduce: Codec):
                got = reduce.exchange(tensors, state.quantizer, axis_name, **extra_args)
                return got.mean, got.own, state.loss, got.state, bit_pair(got.bits)

            def compressed():
                rows = {path: buckets(x, cuts[path].k) for path, x in tensors.items()}
                c = {path: project(x, state.basis[path]) for path, x in rows.items()}
                loss = {path: own_loss(rows[path], c[path], path) for path in tensors}
                if ladder:
                    mean, own, loss, bits = exchange_on_ladder(c, loss)
                    return mean, own, loss, state.quantizer, bits
                if quantizer is None or not quantize_coefficients:
                    (mean, loss), bits = collectives.mean((c, loss), axis_name, ring=aggregate == "ring")
                    return decode(mean), decode(c), loss, state.quantizer, bit_pair(bits)
                loss, loss_bits = collectives.mean(loss, axis_name)
                got = reduce.exchange(c, state.quantizer, axis_name, **extra_args)
                return decode(got.mean), decode(got.own), loss, got.state, sum_bits(got.bits, loss_bits)

            def own_loss(rows: jax.Array, c: jax.Array, path: str) -> jax.Array:
                largest = jnp.max(jnp.abs(rows))
                scale = jnp.where(largest > 0, largest, 1)
                kept = ((c - state.projected[path]) / scale) ** 2
                lost = jnp.sum(((rows - state.mu[path]) / scale) ** 2)
                if ladder:
                    widths = jnp.array([*cuts[path].widths, 0], jnp.int32)
                    kept = jnp.where(jnp.arange(c.shape[-1], dtype=jnp.int32) < widths[rung[path]], kept, 0)
                    lost = jnp.where(rung[path] < len(cuts[path].widths), lost, 0)
                relative = jnp.maximum(lost - jnp.sum(kept), 0) / jnp.sum((rows / scale) ** 2)
                # Where mu is larger by far, or a gradient not finite, which its mean will show.
                relative = jnp.where(jnp.isfinite(relative), relative, 1)
                return jnp.where(largest > 0, relative, 0)

            def exchange_on_ladder(c: Tensors, loss: Tensors):
                """Each leaf at its own rung: what they send fills one buffer from the front, and that much is sent."""
                # What is chosen by its loss may also stay dense.
                whole = select != "ratio"

                def on_rung(path: str, take, otherwise):
                    branches = [functools.partial(take, d) for d in cuts[path].widths] + [otherwise] * whole
                    return lax.switch(rung[path], branches)

                def piece(path: str) -> jax.Array:
                    x = tensors[path]
                    size = x.size if whole else c[path].size

                    def take(d: int) -> jax.Array:
                        part = c[path][:, :d].reshape(-1)
                        return jnp.pad(part, (0, size - part.size))

                    return on_rung(path, take, lambda: x.reshape(-1))

                def leaf(path: str, piece: jax.Array) -> jax.Array:
                    cut = cuts[path]

                    def take(d: int) -> jax.Array:
                        part = piece[: cut.slices * d].reshape(cut.slices, d)
                        return decode({path: part})[path]

                    return on_rung(path, take, lambda: piece.reshape(tensors[path].shape))

                pieces = {path: piece(path) for path in tensors}
                lengths = {
                    p: [cut.slices * d for d in cut.widths] + [tensors[p].size] * whole for p, cut in cuts.items()
                }
                wide = np.result_type(*(x.dtype for x in tensors.values()))
                losses = jnp.stack([x.astype(wide) for x in loss.values()])
                means, mean_loss, bits = mean_of_fronts(
                    pieces, lengths, rung, axis_name, beside=losses, ring=aggregate == "ring"
                )
                mean_losses = {path: mean_loss[i].astype(x.dtype) for i, (path, x) in enumerate(loss.items())}
                mean, own = ({path: leaf(path, x[path]) for path in tensors} for x in (means, pieces))
                return mean, own, mean_losses, bits

            def training_or_not():
                if quantizer is None:
                    return dense(exact)
                return lax.cond(position >= 0, lambda: dense(reduce), lambda: dense(exact))

            mean, own, loss, inner, bits = lax.cond(position >= train_steps, compressed, training_or_not)
            training = (position >= 0) & (position < train_steps)
            row = jnp.clip(position, 0, train_steps - 1)

            def averaged(mean: jax.Array, sample: jax.Array) -> jax.Array:
                """The mean of row + 1 samples, from that of the first row."""
                weight = 1 / (row + 1).astype(mean.dtype)
                return (1 - weight) * mean + weight * sample

            def record(samples: jax.Array, rows: jax.Array, reuse: int) -> jax.Array:
                # A row at a time, outside any cond: one that carried the samples would copy them.
                return samples.at[row].set(jnp.where(training, rows[::reuse], samples[row]))

            rows = {path: buckets(x, cuts[path].k) for path, x in mean.items()}
            next_samples = {path: record(x, rows[path], cuts[path].reuse) for path, x in state.samples.items()}
            next_mu = {p: jnp.where(training, averaged(x, rows[p]), x) for p, x in state.mu.items()}

            def fit():
                """The bases, each leaf's rung, and U^T mu, from the samples."""
                # On a step that is not finite nothing of this is kept, but LAPACK must not see it.
                samples = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), next_samples)
                fits = {path: fit_leaf(x, cuts[path].widths) for path, x in samples.items()}
                bases = {path: basis for path, (basis, _) in fits.items()}
                rungs = {path: rung for path, (_, rung) in fits.items()} if select != "ratio" else {}
                (bases, rungs), bits = collectives.from_first((bases, rungs), axis_name)
                # Of the last row and the mean before it: with next_mu as an operand a copy of that would be made.
                projected = {
                    p: averaged(project(state.mu[p], basis), project(rows[p], basis)) for p, basis in bases.items()
                }
                return bases, rungs, projected, bit_pair(bits)

            kept = state.basis, state.rung, state.projected, bit_pair(0)
            basis, next_rung, projected, fit_bits = lax.cond(position == train_steps - 1, fit, lambda: kept)
            next_position = jnp.where(position + 1 < train_steps + compress_steps, position + 1, -settling)
            next_state = GradiVeQState(next_position, next_samples, next_mu, basis, projected, next_rung, loss, inner)
            return Exchanged(mean, own, next_state, sum_bits(bits, fit_bits))

        return Codec("gradiveq", init, exchange, is_convolution, shrinks, linear=quantizer is None)

    others = {
        "k": k,
        "train_steps": train_steps,
        "compress_steps": compress_steps,
        "warmup_steps": warmup_steps,
        "k_max": k_max,
        "reuse": reuse,
        "aggregate": aggregate,
    }
    switchable = select == "ratio" and quantizer is None
    codec = build((ratio,), error_feedback)
    return compressor(
        codec._replace(levels=Levels("ratio", ratio, False, others, build) if switchable else None),
        axis_name=axis_name,
        error_feedback=error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
