"""The cost model of the planner: numbers in, seconds out.

For a collective of p bytes among n workers, each behind a link of rate b (bytes a second) and latency a:

| collective | seconds |
|---|---|
| all-reduce, as a ring | 2 (n - 1) a + 2 (n - 1) / n p / b |
| all-reduce, as a tree | 2 ceil(log2 n) a + 2 p / b |
| all-gather, as a ring | (n - 1) a + (n - 1) p / b |
| all-to-all, reduce-scatter | (n - 1) a + (n - 1) / n p / b |
| permute | a + p / b |

An all-reduce takes the faster of the two. The ring is that of Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", JPDC 2009. The tree is that of Sanders, Speck and Träff, "Two-tree algorithms
for full bandwidth broadcast, reduction and scan", Parallel Computing 2009; NCCL has both.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gradcomp_jax.hlo import RING_LAW

# What packets add to their data: TCP over Ethernet frames of 1,500 bytes, as measured on shaped links.
HEADERS = 1.046
# The share of a step that is backward pass: it has two of the three products of each layer.
BACKWARD = 2 / 3


class Link(NamedTuple):
    """A link between workers.

    Attributes:
      bits_per_second: the rate at which a worker sends, while it receives as much.
      latency_seconds: the seconds from the start of an empty message to its arrival.
      headers: the bytes on the link for each byte of a message.
    """

    bits_per_second: float
    latency_seconds: float = 1e-4
    headers: float = HEADERS

    def seconds(self, size: float) -> float:
        """The seconds in which `size` bytes pass."""
        return 8 * self.headers * size / self.bits_per_second

    def shared(self, devices: int) -> "Link":
        """The part of one of so many devices that send at once."""
        return self._replace(bits_per_second=self.bits_per_second / devices)


class Talk(NamedTuple):
    """A collective.

    Attributes:
      kind: the kind, as in `gradcomp_jax.Collective`.
      bytes: the bytes of its operands on one worker, over all calls.
      workers: the number of workers.
      calls: how many messages it makes, one after another.
      tree: whether an all-reduce may be a tree; gloo, on CPUs, has rings alone.
    """

    kind: str
    bytes: float
    workers: int
    calls: int = 1
    tree: bool = True

    @property
    def sent(self) -> float:
        """The bytes that one worker sends by the ring laws."""
        return RING_LAW[self.kind](self.workers, self.bytes) if self.workers > 1 else 0.0


class Cost(NamedTuple):
    """The seconds of a step on one device.

    Attributes:
      compute: of the local step: forward and backward pass, and the optimiser.
      codec: of an exchange, to encode, decode and keep residuals.
      wire: of an exchange, on the link between workers.
      inside: of a step, on the links between the devices of one worker.
      overlap: the share of `wire` and `inside` that the compiler can start before the backward pass ends.
      every: the steps from one exchange to the next.
    """

    compute: float
    codec: float = 0.0
    wire: float = 0.0
    inside: float = 0.0
    overlap: float = 0.0
    every: int = 1

    @property
    def hidden(self) -> float:
        """The seconds of a step's messages during which the device computes its backward pass."""
        return min(self.overlap * (self.wire / self.every + self.inside), BACKWARD * self.compute)

    @property
    def step(self) -> float:
        """The seconds of a step; an exchange is spread over its period."""
        return self.compute + (self.codec + self.wire) / self.every + self.inside - self.hidden


def hops(kind: str, workers: int) -> int:
    """The messages of a collective that wait for one another, in a ring."""
    return {"all-reduce": 2 * (workers - 1), "collective-permute": 1}.get(kind, workers - 1)


def seconds(talk: Talk, link: Link) -> float:
    """The seconds that a collective takes on a link of each worker."""
    n, calls = talk.workers, talk.calls
    if n == 1:
        return 0.0
    ring = calls * hops(talk.kind, n) * link.latency_seconds + link.seconds(talk.sent)
    if talk.kind != "all-reduce" or not talk.tree:
        return ring
    return min(ring, calls * 2 * math.ceil(math.log2(n)) * link.latency_seconds + link.seconds(2 * talk.bytes))


def total(talks: Iterable[Talk], link: Link) -> float:
    """The seconds of collectives one after another."""
    return math.fsum(seconds(talk, link) for talk in talks)


def fitted_link(workers: int, empty: float, full: float, size: int) -> Link:
    """The link on which a ring's all-reduces take the seconds that were measured.

    Args:
      workers: the number of workers, 2 or more.
      empty: the seconds of an all-reduce of almost nothing.
      full: the seconds of an all-reduce of `size` bytes.
      size: the bytes.
    """
    passing = max(full - empty, 1e-9)
    return Link(8 * HEADERS * Talk("all-reduce", size, workers).sent / passing, empty / (2 * (workers - 1)))


class Choice(NamedTuple):
    """A choice among steps.

    Attributes:
      name: the name of the step to take.
      faster: how many times faster it is than the uncompressed one; 1 for that one.
    """

    name: str
    faster: float


def choose(steps: Sequence[tuple[str, float]], dense: float, margin: float, close: float) -> Choice | None:
    """The step to take instead of an uncompressed one; None if none is faster by the margin.

    Args:
      steps: names and seconds; the first ones change training least.
      dense: the seconds of the uncompressed step.
      margin: the part by which a step must be faster, such as 0.1: what the model may be wrong by.
      close: of steps that are slower than the fastest by at most this part, the first is taken.
    """
    least = min((seconds for _, seconds in steps), default=math.inf)
    if least * (1 + margin) > dense:
        return None
    name, found = next(each for each in steps if each[1] <= (1 + close) * least and each[1] * (1 + margin) <= dense)
    return Choice(name, dense / found)
