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

This is the paper's U U^T (g_m - mu_m) + mu_m without a gradient-sized difference. The compression is linear, so nothing
is decompressed before the sum. A warm-up of dense steps comes before the first cycle.

Where the paper leaves room: all slices of a layer share the U of the first (its reuse factor s at infinity, see
`reuse`), but each has its own mu. U is computed from the L_t x L_t Gram matrix of the samples with eigh and QR;
dividing by the eigenvalues instead loses orthogonality in float32. The largest entry of each column is made positive.
All workers take the first worker's U, because unlike processors may order close eigenvalues differently.

The rank trap: L_t samples span at most L_t - 1 directions. At L_t = 100 and K = 768 the paper's rule, to keep 99 % of
the samples' variance, therefore allows a ratio of 7.8 for any data, even noise. Fresh gradients then lose nearly
everything. `select="holdout"` measures the loss on samples that the basis has not seen.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder
from gradcomp_jax.compressor import Compressor, compressor, quantizing
from gradcomp_jax.contract import (
    AxisName,
    Bucketing,
    Codec,
    Context,
    First,
    Predicate,
    Result,
    Say,
    Strength,
    Talk,
    Tensors,
    require_whole,
    total,
)
from gradcomp_jax.cuts import Cut, whole
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.views import buckets, from_buckets, inverse_power, wide

# The kinds of steps, by number.
DENSE, COMPRESSED, TRAINING = 0, 1, 2
SELECT = ("ratio", "energy", "holdout")
# K / d on the rungs; "energy" and "holdout" choose one.
RATIOS = (32, 16, 8, 4)
# Larger losses count as 1.
FAR = 2.0**64


class GradiVeQState(NamedTuple):
    """State of `gradiveq`, the same on all workers; arrays are by leaf path.

    Attributes:
      position: int32, the place in the cycle. Below 0: dense steps that are no samples (the warm-up). From 0 on: the
        row of the next sample. From L_t on: compressed steps.
      samples: aggregated first slices of each group in the training steps, [L_t, groups, K].
      mu: each slice's mean over the training steps, [slices, K].
      basis: U, [groups, K, d]; on a ladder d is the widest rung's.
      projected: U^T mu, [slices, d].
      rung: int32, the place on the ladder of `select`; empty for "ratio".
      loss: |own - gradient|^2 / |gradient|^2 in the last compressed step (eq. 7), mean over the workers; 0 for a
        gradient of zeros. A quantizer's loss is not in it.
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
      slices: their number; the last one is padded with zeros.
      groups: the number of their bases.
      widths: the d of each rung, ascending; below the number of samples.
    """

    k: int
    slices: int
    groups: int
    widths: tuple[int, ...]

    @property
    def reuse(self) -> int:
        """The number of slices that share a basis."""
        return -(-self.slices // self.groups)


def slice_length(shape: tuple[int, ...], k_max: int = 768) -> int:
    """K for a leaf of this shape [..., D, F]: a multiple of F D that tiles it, if that is at most k_max.

    At multiples of F D, the values at one spatial position, the loss drops sharply (Fig. 5). If F D is above k_max, K
    is the largest multiple of F that tiles the leaf. If F is above k_max too, K is the largest divisor of F up to
    k_max. If there is none, as for a prime F, K is k_max, and the last slice is not full. Slices shorter than D F begin
    at different depths. The basis of the first one fits slices at other depths less well.
    """
    size = math.prod(shape)
    for unit in (math.prod(shape[-2:]), math.prod(shape[-1:])):
        fitting = [k for k in range(unit, k_max + 1, unit) if size % k == 0]
        if fitting:
            return fitting[-1]
    return max((k for k in range(2, k_max + 1) if shape[-1] % k == 0), default=k_max)


def principal_basis(samples: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """The top d principal components of samples [L, K], as columns [K, d], and all variances [L], descending.

    Columns are orthonormal; columns whose variance is only rounding are zero. d is at most min(L, K). Variances are
    relative to the square of the power of two below the largest sample.
    """
    x = samples * inverse_power(jnp.max(jnp.abs(samples)))  # sums and squares of samples may leave their type's range
    x = x - jnp.mean(x, axis=0, keepdims=True)
    variance, v = jnp.linalg.eigh(_matmul(x, x.T))
    variance, v = jnp.maximum(variance[::-1], 0), v[:, ::-1]
    u, _ = jnp.linalg.qr(_matmul(x.T, v[:, :d]))
    carries = variance[:d] > len(x) * jnp.finfo(x.dtype).eps * variance[0]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)
    return jnp.where(carries, u * jnp.where(largest < 0, -1, 1).astype(u.dtype), 0), variance


def unexplained(samples: jax.Array, basis: jax.Array, mu: jax.Array) -> jax.Array:
    """|x - xhat|^2 / |x|^2 over samples x [L, K], for each number of kept columns of the basis [K, d]: [d].

    xhat = U U^T (x - mu) + mu. The result is ones if the samples are all zero.
    """
    some, down = scaling(samples)
    x, centred = samples * down, (samples - mu[None]) * down
    kept = jnp.cumsum(jnp.sum(_matmul(centred, basis) ** 2, axis=0))
    of_all = jnp.where(some, jnp.sum(x**2), 1)
    return jnp.where(some, jnp.maximum(jnp.sum(centred**2) - kept, 0) / of_all, 1)


def scaling(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether x is not all zeros; and a power of two that brings the sum of its squares into range, 1 for zeros."""
    largest = jnp.max(jnp.abs(x))
    return largest > 0, jnp.where(largest > 0, inverse_power(largest), 1)


def project(rows: jax.Array, basis: jax.Array) -> jax.Array:
    """U^T g for every slice: rows [slices, K], basis [groups, K, d] -> [slices, d]."""
    return _matmul(_grouped(rows, len(basis)), basis).reshape(-1, basis.shape[-1])[: len(rows)]


def restore(
    c: jax.Array, basis: jax.Array, projected: jax.Array, mu: jax.Array, used: jax.Array | None = None
) -> jax.Array:
    """U (c - U^T mu) + mu for every slice: c [slices, d] -> [slices, K]; with the first `used` columns of U, or all."""
    centred = kept(c - projected, used)
    rows = _matmul(_grouped(centred, len(basis)), basis.swapaxes(1, 2))
    return rows.reshape(-1, mu.shape[-1])[: len(mu)] + mu


def kept(c: jax.Array, used: jax.Array | None) -> jax.Array:
    """Coefficients [slices, d] with zeros beyond the first `used` columns, if `used` is given."""
    return c if used is None else jnp.where(jnp.arange(c.shape[-1], dtype=jnp.int32) < used, c, 0)


def relative_loss(rows: jax.Array, c: jax.Array, leaf: Any, used: jax.Array | None) -> jax.Array:
    """|xhat - x|^2 / |x|^2 for slices x [slices, K] with coefficients c [slices, d] (eq. 7); 0 for zeros."""
    some, down = scaling(rows)
    inside = jnp.sum(kept((c - leaf.projected) * down, used) ** 2)
    lost = jnp.sum(((rows - leaf.mu) * down) ** 2)
    relative = jnp.maximum(lost - inside, 0) / jnp.where(some, jnp.sum((rows * down) ** 2), 1)
    # It is larger if mu is far larger, or if a gradient is not finite, which the mean will show. A huge loss, from a
    # few elements, would itself count as not finite beside numbers that may grow, in all later steps.
    relative = jnp.where(relative <= FAR, relative, 1)
    return jnp.where(some, relative, 0)


def of_leaf(x: jax.Array, ctx: Context) -> jax.Array:
    """A shard with zeros beyond the leaf's end: the values that a last slice decodes to there are no loss."""
    if ctx.shard is None or x.size * ctx.shards == math.prod(ctx.whole):
        return x
    left = math.prod(ctx.whole) - ctx.shard * x.size
    return jnp.where(jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape) < left, x, 0)


def averaged(mean: jax.Array, sample: jax.Array, row: jax.Array) -> jax.Array:
    """The mean of row + 1 samples, from the mean of the first `row` samples."""
    weight = 1 / (row + 1).astype(mean.dtype)
    return (1 - weight) * mean + weight * sample


def _grouped(rows: jax.Array, groups: int) -> jax.Array:
    """[slices, ...] -> [groups, slices for one basis, ...], filled up with zeros."""
    size = -(-len(rows) // groups)
    missing = groups * size - len(rows)
    rows = jnp.pad(rows, [(0, missing), (0, 0)]) if missing else rows
    return rows.reshape(groups, size, -1)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    # HIGHEST: TPUs round to bfloat16 by default, and then own and mean would differ.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class GradiVeQ(Codec):
    """The codec; see `gradiveq` for its settings.

    Attributes:
      ratios: K / d: one, or several; then a leaf's strength chooses one.
      settling: the dense steps at the start of a cycle, which send the last one's debt: 1 under error feedback, else 0.
      numbers: the coder for the training steps, and for coefficients if `coefficients`; None for sums.
    """

    k: int | None
    ratios: tuple[float, ...]
    train_steps: int
    compress_steps: int
    warmup_steps: int
    k_max: int
    reuse: int | None
    select: str
    max_loss: float
    settling: int
    numbers: Coder | None = None
    coefficients: bool = True

    name: ClassVar[str] = "gradiveq"
    by_leaf: ClassVar[tuple[str, ...]] = ("samples", "mu", "basis", "projected", "rung", "loss")

    @property
    def coder(self) -> Coder | None:
        return self.numbers

    @property
    def phases(self) -> int:
        return 2 if self.numbers is None else 3

    @property
    def fitted(self) -> int:
        """The number of samples that a basis is fitted on; the others are held out."""
        return self.train_steps - self.train_steps // 5 if self.select == "holdout" else self.train_steps

    @property
    def strength(self) -> Strength | None:
        names = ("k", "train_steps", "compress_steps", "warmup_steps", "k_max", "reuse")
        others = {name: getattr(self, name) for name in names}
        if self.select != "ratio" or self.numbers:
            return None
        return Strength("ratio", self.ratios[0], False, others, self.at)

    def at(self, ratios: tuple[float, ...]) -> "GradiVeQ":
        """The codec with these ratios."""
        return dataclasses.replace(self, ratios=ratios)

    def default(self, path: str, leaf: Any) -> bool:
        return leaf.ndim >= 4

    def layout(self, path: str, leaf: Any) -> Layout:
        """How a leaf is cut, and the d of each strength; the slices of a shard have the leaf's length."""
        full = whole(leaf)
        length = min(full.size, self.k or slice_length(full.shape, self.k_max))
        slices = -(-full.size // length)
        groups = -(-slices // min(slices, self.reuse or slices))
        widths = self.widths(path, length)
        if full is leaf:
            return Layout(length, slices, groups, widths)
        mine = -(-leaf.size // length)
        return Layout(length, mine, 1 if groups == 1 else -(-mine // -(-slices // groups)), widths)

    def widths(self, path: str, length: int) -> tuple[int, ...]:
        """The d of each strength: from `ratios`, or the rungs in ascending order."""
        if self.select != "ratio":
            return tuple(sorted({max(1, min(length // r, self.fitted - 1)) for r in RATIOS}))
        widths = tuple(max(1, int(length / ratio)) for ratio in self.ratios)
        for ratio, d in zip(self.ratios, widths, strict=True):
            if d > self.train_steps - 1:
                raise ValueError(
                    f"leaf {path!r}: K={length} at ratio={ratio} keeps d={d} directions, but "
                    f"train_steps={self.train_steps} samples span {self.train_steps - 1} only: use "
                    f"train_steps={d + 1} or more, a larger ratio, or a smaller k or k_max"
                )
        return widths

    def cut(self, path: str, leaf: Any) -> Cut:
        of = self.layout(path, leaf)
        return Cut((leaf.size,), 0, of.k if of.groups == 1 else of.k * of.reuse)

    def arrives(self, path: str, leaf: Any) -> int:
        del path, leaf
        return 0  # because slices run through it

    def of_shards(self, state: GradiVeQState, f: Callable[[Any, str], Any]) -> GradiVeQState:
        return state._replace(**{name: f(getattr(state, name), name) for name in self.by_leaf if getattr(state, name)})

    def shard_cut(self, name: str, path: str, leaf: Any) -> Cut | None:
        of = self.layout(path, leaf)
        apart = of.groups > 1
        cuts = {
            "mu": Cut((of.slices, of.k), 0, of.reuse if apart else 1),
            "projected": Cut((of.slices, max(of.widths)), 0, of.reuse if apart else 1),
            "basis": Cut((of.groups, of.k, max(of.widths))) if apart else None,
            "samples": Cut((self.train_steps, of.groups, of.k), 1) if apart else None,
        }
        return cuts.get(name)

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        if not leaf.size:
            return False
        of = self.layout(path, leaf)
        return (of.slices * min(of.widths) + 1) * wide(leaf.dtype).itemsize < uncompressed

    def view(self, path: str, leaf: Any) -> str:
        of = self.layout(path, leaf)
        return f"{of.slices} slices of K={of.k}, by {' or '.join(map(str, of.widths))} numbers each"

    def init(self, path: str, leaf: Any, salt: int) -> dict[str, Any]:
        of = self.layout(path, leaf)
        zeros = functools.partial(jnp.zeros, dtype=leaf.dtype)
        return {
            "samples": zeros((self.train_steps, of.groups, of.k)),
            "mu": zeros((of.slices, of.k)),
            "basis": zeros((of.groups, of.k, max(of.widths))),
            "projected": zeros((of.slices, max(of.widths))),
            "loss": zeros(()),
            **({"rung": jnp.int32(0)} if self.select != "ratio" else {}),
        }

    def start(self, leaves: dict[str, dict[str, Any]]) -> GradiVeQState:
        fields = {name: {path: x[name] for path, x in leaves.items() if name in x} for name in self.by_leaf}
        quantizer = self.numbers.start() if self.numbers else ()
        return GradiVeQState(position=jnp.int32(-self.warmup_steps - self.settling), quantizer=quantizer, **fields)

    def phase(self, state: GradiVeQState) -> jax.Array:
        training = jnp.where(state.position >= 0, TRAINING, DENSE) if self.numbers else DENSE
        return jnp.where(state.position >= self.train_steps, COMPRESSED, training).astype(jnp.int32)

    def kinds(self, state: GradiVeQState) -> dict[str, GradiVeQState]:
        at = lambda position: state._replace(position=jnp.int32(position))  # noqa: E731
        found = {"compressed": at(self.train_steps)}
        if self.select != "ratio":
            whole = {path: jnp.int32(len(self.widths("", mu.shape[-1]))) for path, mu in state.mu.items()}
            narrowest = dict.fromkeys(whole, jnp.int32(0))
            found = {
                "compressed, by the fewest numbers": found["compressed"]._replace(rung=narrowest),
                "compressed, where no basis will do": found["compressed"]._replace(rung=whole),
            }
        if self.numbers is None or self.warmup_steps + self.settling:
            found["dense"] = at(-1)
        if self.numbers is not None:
            found["training"] = at(0)
        return found | {"last of training, with the bases": at(self.train_steps - 1)}

    def strengths(self, state: GradiVeQState, paths: Iterable[str], learning_rate: Any) -> dict[str, jax.Array]:
        return state.rung

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        if phase != COMPRESSED:
            # The samples' mean, and its products with a basis, must stay finite.
            heard = yield Say(total(d), exact=phase == DENSE, apart=True, growth=4.0 * leaf.mu.shape[-1])
            return Result(heard.mean, heard.own, {"loss": leaf.loss})
        if self.select != "ratio":
            return (yield from self.on_rungs(total(d), leaf, ctx))
        return (yield from self.compressed(total(d), leaf, ctx))

    def compressed(self, x: jax.Array, leaf: Any, ctx: Context) -> Talk:
        """A step in the compressed space."""
        rows = buckets(x, leaf.mu.shape[-1])
        c = project(rows, leaf.basis)
        widths = self.widths("", rows.shape[-1])
        used = None if ctx.strength is None else jnp.array(widths, jnp.int32)[ctx.strength]
        # Columns lead, so that those of a narrower basis are in front.
        fronts = None if used is None else tuple(len(rows) * d for d in widths)
        said = Say(c.T, fronts, exact=not self.coefficients, growth=4.0 * rows.shape[-1])
        heard, loss = yield said, Say(relative_loss(rows, c, leaf, used), exact=True)

        def decode(c: jax.Array) -> jax.Array:
            return from_buckets(restore(c.T, leaf.basis, leaf.projected, leaf.mu, used), x.shape)

        own = of_leaf(decode(heard.own), ctx)
        return Result(decode(heard.mean), own, {"loss": loss.mean}, affine=True)

    def on_rungs(self, x: jax.Array, leaf: Any, ctx: Context) -> Talk:
        """A step in which the leaf sends the columns of its rung, or the whole leaf."""
        rows = buckets(x, leaf.mu.shape[-1])
        widths = self.widths("", rows.shape[-1])
        c, whole = project(rows, leaf.basis), leaf.rung == len(widths)
        used = jnp.array([*widths, 0], jnp.int32)[leaf.rung]
        loss = jnp.where(whole, 0, relative_loss(rows, c, leaf, used))
        coefficients = jnp.pad(c.T.reshape(-1), (0, max(0, x.size - c.size)))[: x.size]
        fronts = *(min(x.size, len(rows) * d) for d in widths), x.size
        said = Say(jnp.where(whole, x.reshape(-1), coefficients), fronts, growth=4.0 * rows.shape[-1])
        heard, losses = yield said, Say(loss, exact=True)

        def decode(sent: jax.Array) -> jax.Array:
            c = jnp.pad(sent, (0, max(0, leaf.projected.size - x.size)))[: leaf.projected.size]
            c = c.reshape(leaf.projected.shape[::-1]).T
            decoded = restore(c, leaf.basis, leaf.projected, leaf.mu, used)
            return jnp.where(whole, sent.reshape(x.shape), from_buckets(decoded, x.shape))

        own = of_leaf(decode(heard.own), ctx)
        return Result(decode(heard.mean), own, {"loss": losses.mean}, affine=True)

    def row(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether a step is a training step, and the row of its sample."""
        training = (position >= 0) & (position < self.train_steps)
        return training, jnp.clip(position, 0, self.train_steps - 1)

    def absorb(
        self, leaf: Any, d: tuple[jax.Array, ...], mean: jax.Array, ok: jax.Array, ctx: Context
    ) -> dict[str, Any]:
        rows = buckets(mean, leaf.mu.shape[-1])
        training, row = self.row(leaf.position)
        taken = training & ok
        first = rows[:: -(-len(rows) // len(leaf.basis))]
        # One row at a time, outside any conditional: a conditional that carried the samples would copy them.
        samples = leaf.samples.at[row].set(jnp.where(taken, first, leaf.samples[row]))
        return {"samples": samples}

    def adopt(self, leaf: Any, mean: jax.Array, ok: jax.Array) -> dict[str, Any]:
        rows = buckets(mean, leaf.mu.shape[-1])
        training, row = self.row(leaf.position)
        return {"mu": jnp.where(training & ok, averaged(leaf.mu, rows, row), leaf.mu)}

    def due(self, state: GradiVeQState) -> jax.Array:
        return state.position == self.train_steps - 1

    def refresh(self, before: Any, after: Any, mean: jax.Array, ctx: Context) -> Any:
        basis, rung = self.fit(after.samples, self.widths("", after.samples.shape[-1]))
        shared = self.layout("", jax.ShapeDtypeStruct(ctx.whole, mean.dtype)).groups == 1
        # In one type, for one message.
        fitted = basis, () if self.select == "ratio" else rung.astype(basis.dtype)
        basis, rung = yield First(fitted, of_first_shard=shared)
        # From the last row and the mean before it: if the next mu were an operand, it would be copied.
        rows = buckets(mean, before.mu.shape[-1])
        _, row = self.row(before.position)
        projected = averaged(project(before.mu, basis), project(rows, basis), row)
        chosen = {} if self.select == "ratio" else {"rung": rung.astype(jnp.int32)}
        return {"basis": basis, "projected": projected, **chosen}

    def kept(self, leaf: Any) -> dict[str, Any]:
        chosen = {} if self.select == "ratio" else {"rung": leaf.rung}
        return {"basis": leaf.basis, "projected": leaf.projected, **chosen}

    def fit(self, samples: jax.Array, widths: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """U [groups, K, d] from samples [L, groups, K], and the rung."""

        def fit_group(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
            basis, variance = principal_basis(samples[: self.fitted], max(widths))
            if self.select == "holdout":
                lost = unexplained(samples[self.fitted :], basis, jnp.mean(samples[: self.fitted], axis=0))
            else:
                sum_ = jnp.sum(variance)
                lost = jnp.where(sum_ > 0, 1 - jnp.cumsum(variance) / jnp.where(sum_ > 0, sum_, 1), 1)
            return basis, lost[jnp.array(widths, jnp.int32) - 1]

        # One after another: a batched eigh on emulated devices can deadlock in XLA's thread pool.
        basis, lost = lax.map(fit_group, samples.swapaxes(0, 1))
        enough = jnp.append(jnp.max(lost, axis=0) <= self.max_loss, True)
        return basis, jnp.argmax(enough).astype(jnp.int32)

    def tick(self, state: GradiVeQState, after: GradiVeQState, ctx: Context) -> GradiVeQState:
        position = state.position + 1
        ends = position >= self.train_steps + self.compress_steps
        return after._replace(position=jnp.where(ends, -self.settling, position))


@factory
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
    error_feedback: bool | Feedback | EF21 = False,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """GradiVeQ (Yu et al., NeurIPS 2018), linear, with one all-reduce in the compressed space.

    Steps go in cycles, after `warmup_steps` dense ones. A cycle has `train_steps` dense steps; the bases are fitted on
    them, and the first worker sends the bases in the last one. Then `compress_steps` steps send d = K / ratio floats
    for each slice of K, and one float a leaf for the loss in the state. A skipped step does not count. So the bytes of
    a run are those of its phases, and a run shorter than the warm-up is not compressed at all.

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
      k_max: the largest K if k is None; K costs 4 d flops an element to compress and restore.
      reuse: s, the largest number of consecutive slices that share one basis, which is computed from the first of them;
        by default all slices of a leaf. Groups are of one size, except for the last.
      select: "ratio", "energy" or "holdout". The last two choose d for each leaf at the end of each training phase: the
        smallest of K/32, K/16, K/8, K/4 (but below the number of samples) that loses at most max_loss of the first
        slice of each group. If none does, the leaf is sent dense. "energy" is the paper's rule. It takes the variance
        of the training samples themselves, and falls into the rank trap if K / train_steps is large. "holdout" fits on
        the first 4/5 of the samples and takes the squared relative loss on the others. The state's `loss` is that of
        all slices.
      max_loss: lambda, for "energy" and "holdout".
      aggregate: "psum", or "ring", the paper's Algorithm 1 hop by hop: each hop adds in compressed form.
      quantizer: a compressor, such as `qsgd(4)`. The gradients of the training steps travel through its codec, as in
        the paper's experiments, and so do the coefficients of the compressed steps. For select="ratio"; not linear.
      quantize_coefficients: whether the quantizer serves the compressed steps too; the paper's does not.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: keep residuals, which the paper does not. A residual waits for the end of the compressed steps.
        Then one more dense step, which is no sample, sends it.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default, like in the paper, convolutions: leaves of
        four axes or more.
      allow_dense: accept a tree whose leaves are all sent dense.
      dense_dtype: the type of leaves that are sent dense, and of all leaves in dense steps, "bfloat16" or "float16"; by
        default float32 or wider. Rounding is fed back if there are residuals.
      buckets: the number of parts of the exchange. Each sends messages of its own once its gradients are there. Or
        (path) -> the number of a leaf's part; lower numbers go first. For the default see `compressor`.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument is out of range; in init, a leaf's d is not below train_steps; later, a refusal of
        `compressor`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.gradiveq(ratio=8), optax.sgd(0.1, momentum=0.9))
    """
    del seed
    if k is not None:
        require_whole("k", k, 1)
    if not ratio > 1:
        raise ValueError(f"ratio={ratio} must be above 1, it is the K / d of a slice")
    if select not in SELECT:
        raise ValueError(f"select={select!r} must be one of {', '.join(map(repr, SELECT))}")
    # A fifth of the samples is held out, but at least one.
    require_whole("train_steps", train_steps, 5 if select == "holdout" else 2)
    require_whole("compress_steps", compress_steps, 1)
    require_whole("warmup_steps", warmup_steps, 0)
    require_whole("k_max", k_max, 1)
    if reuse is not None:
        require_whole("reuse", reuse, 1)
    if quantizer is not None and select != "ratio":
        raise ValueError(f"select={select!r} goes without a quantizer: its loss would be taken for the basis's loss")
    if not 0 < max_loss < 1:
        raise ValueError(f"max_loss={max_loss} must be above 0 and below 1")
    require_aggregate("gradiveq", None, aggregate)
    numbers, way = quantizing("gradiveq", quantizer, aggregate, axis_name)
    kept = feedback(error_feedback)
    cycle = train_steps, compress_steps, warmup_steps
    settling = int(kept is not None and kept.owes)
    codec = GradiVeQ(k, (ratio,), *cycle, k_max, reuse, select, max_loss, settling, numbers, quantize_coefficients)
    return compressor(codec, Settings(axis_name, kept, min_size, compress, allow_dense, way, dense_dtype, buckets))
