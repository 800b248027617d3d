"""Gradient compression for data-parallel training in JAX, as optax transformations.

>>> import optax
>>> from gradcomp_jax import powersgd
>>> tx = optax.chain(powersgd(rank=4), optax.sgd(0.1, momentum=0.9))
"""

from gradcomp_jax.codecs.gradiveq import GradiVeQState, gradiveq
from gradcomp_jax.codecs.none import average, none
from gradcomp_jax.codecs.powersgd import PowerSGDState, powersgd
from gradcomp_jax.codecs.qsgd import QSGDState, qsgd
from gradcomp_jax.collectives import vary
from gradcomp_jax.compressor import Compressor, CompressorState, skipped
from gradcomp_jax.metrics import Collective, WireBits, WireCount, collective_bytes, wire_bits
from gradcomp_jax.momentum import EFMomentumState, ef_momentum
from gradcomp_jax.sharding import PerWorker, global_state, init, local_state, resize_workers, state_specs
from gradcomp_jax.step import flush, make_mesh, simulate, train_step

__all__ = [
    "Collective",
    "Compressor",
    "CompressorState",
    "EFMomentumState",
    "GradiVeQState",
    "PerWorker",
    "PowerSGDState",
    "QSGDState",
    "WireBits",
    "WireCount",
    "average",
    "collective_bytes",
    "ef_momentum",
    "flush",
    "global_state",
    "gradiveq",
    "init",
    "local_state",
    "make_mesh",
    "none",
    "powersgd",
    "qsgd",
    "resize_workers",
    "simulate",
    "skipped",
    "state_specs",
    "train_step",
    "vary",
    "wire_bits",
]
