"""Gradient compression for data-parallel training in JAX, as optax transformations.

>>> import optax
>>> import gradcomp_jax as gcj
>>> tx = optax.chain(gcj.powersgd(rank=4), optax.sgd(0.1, momentum=0.9))
"""

from collections.abc import Callable

from gradcomp_jax import testing
from gradcomp_jax.across import across
from gradcomp_jax.clipping import clip_by_global_norm
from gradcomp_jax.codecs.accordion import AccordionState, accordion, accordion_log
from gradcomp_jax.codecs.adaptive import AdaptiveState, adaptive
from gradcomp_jax.codecs.cast import cast
from gradcomp_jax.codecs.float4 import float4
from gradcomp_jax.codecs.gradiveq import GradiVeQState, gradiveq
from gradcomp_jax.codecs.none import average, none
from gradcomp_jax.codecs.onebit import OneBitState, onebit
from gradcomp_jax.codecs.powersgd import PowerSGDState, powersgd
from gradcomp_jax.codecs.qsgd import QSGDState, qsgd
from gradcomp_jax.codecs.randomk import SubsetState, randomblock, randomk
from gradcomp_jax.codecs.scheduled import ScheduledState, scheduled
from gradcomp_jax.codecs.signnorm import signnorm
from gradcomp_jax.codecs.statistical import statistical
from gradcomp_jax.codecs.topk import topk
from gradcomp_jax.coder import CodeLength
from gradcomp_jax.compressor import Compressor, CompressorState, MeasuredState, skipped
from gradcomp_jax.delayed import DelayedState, delayed
from gradcomp_jax.describe import Description, describe
from gradcomp_jax.elastic import elastic
from gradcomp_jax.exchange.bits import WireBits, WireCount, code_bits, wire_bits
from gradcomp_jax.exchange.collectives import vary
from gradcomp_jax.feedback import EF21, Feedback
from gradcomp_jax.flush import flush
from gradcomp_jax.hlo import Collective, collective_bytes
from gradcomp_jax.lifeline import Lifeline, initialize_elastic
from gradcomp_jax.loss_scale import LossScaleState, loss_scale, loss_scaled
from gradcomp_jax.mesh import make_mesh
from gradcomp_jax.methods.diloco import diloco, streaming_diloco
from gradcomp_jax.methods.muloco import muloco
from gradcomp_jax.methods.sparseloco import sparseloco
from gradcomp_jax.metrics import LeafMetrics, Metrics, measured, metrics
from gradcomp_jax.momentum import EFMomentumState, ef_momentum
from gradcomp_jax.options import compiler_options
from gradcomp_jax.outer import Outer, outer
from gradcomp_jax.outer_state import OuterState, absent, held, local_params
from gradcomp_jax.parallel import data_parallel
from gradcomp_jax.per_layer import PerLayerState, per_layer
from gradcomp_jax.placing import init, place, shard_batch
from gradcomp_jax.planner import Plan, plan
from gradcomp_jax.replicas import check_replicas
from gradcomp_jax.resizing import resize_workers
from gradcomp_jax.restore import restore
from gradcomp_jax.sharding import PerWorker, global_state, local_state, state_specs
from gradcomp_jax.step import simulate, train_step
from gradcomp_jax.survivors import Share, share_of
from gradcomp_jax.swap import swap
from gradcomp_jax.transform import transformed

CODECS: dict[str, Callable[..., Compressor]] = {
    "none": none,
    "gradiveq": gradiveq,
    "powersgd": powersgd,
    "qsgd": qsgd,
    "onebit": onebit,
    "signnorm": signnorm,
    "topk": topk,
    "adaptive": adaptive,
    "randomk": randomk,
    "randomblock": randomblock,
    "cast": cast,
    "statistical": statistical,
    "float4": float4,
}
"""The factories by name, but `accordion`, which is between two strengths of another codec."""

__all__ = [
    "CODECS",
    "EF21",
    "AccordionState",
    "AdaptiveState",
    "CodeLength",
    "Collective",
    "Compressor",
    "CompressorState",
    "DelayedState",
    "Description",
    "EFMomentumState",
    "Feedback",
    "GradiVeQState",
    "LeafMetrics",
    "Lifeline",
    "LossScaleState",
    "MeasuredState",
    "Metrics",
    "OneBitState",
    "Outer",
    "OuterState",
    "PerLayerState",
    "PerWorker",
    "Plan",
    "PowerSGDState",
    "QSGDState",
    "ScheduledState",
    "Share",
    "SubsetState",
    "WireBits",
    "WireCount",
    "absent",
    "accordion",
    "accordion_log",
    "across",
    "adaptive",
    "average",
    "cast",
    "check_replicas",
    "clip_by_global_norm",
    "code_bits",
    "collective_bytes",
    "compiler_options",
    "data_parallel",
    "delayed",
    "describe",
    "diloco",
    "ef_momentum",
    "elastic",
    "float4",
    "flush",
    "global_state",
    "gradiveq",
    "held",
    "init",
    "initialize_elastic",
    "local_params",
    "local_state",
    "loss_scale",
    "loss_scaled",
    "make_mesh",
    "measured",
    "metrics",
    "muloco",
    "none",
    "onebit",
    "outer",
    "per_layer",
    "place",
    "plan",
    "powersgd",
    "qsgd",
    "randomblock",
    "randomk",
    "resize_workers",
    "restore",
    "scheduled",
    "shard_batch",
    "share_of",
    "signnorm",
    "simulate",
    "skipped",
    "sparseloco",
    "state_specs",
    "statistical",
    "streaming_diloco",
    "swap",
    "testing",
    "topk",
    "train_step",
    "transformed",
    "vary",
    "wire_bits",
]
