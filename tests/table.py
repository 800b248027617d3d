"""The table of codecs, over which every law is tested. A new codec adds its rows here and inherits all."""

from gradcomp_jax import EF21, Feedback, randomblock, randomk, signnorm, statistical, topk
from tests import decoders
from tests.gradiveq_rows import Cycle, accordion_gradiveq_row, gradiveq_row, quantized_gradiveq_row
from tests.rows import (
    ACCORDION,
    TINY,
    adaptive_row,
    by_schedule,
    cast_row,
    chunks_row,
    coded_row,
    falls,
    float4_row,
    gained,
    grows,
    level_of_qsgd,
    none_row,
    onebit_row,
    powersgd_row,
    qsgd_row,
    quantized_powersgd_row,
    quantized_subset_row,
    shared_row,
    size_qsgd,
    size_signnorm,
    size_statistical,
    size_topk,
    subset_row,
    switched_coded_row,
    switched_powersgd_row,
    transformed_row,
)

ROWS = [
    none_row("none"),
    none_row("none-ring", "ring"),
    cast_row("cast-bf16", "bfloat16", "psum", error_feedback=True),
    cast_row("cast-bf16-shuffle", "bfloat16", "shuffle", error_feedback=True),
    cast_row("cast-f16", "float16", "gather"),
    cast_row("cast-e4m3", "float8_e4m3fn", "shuffle", error_feedback=True),
    cast_row("cast-e5m2", "float8_e5m2", "gather", error_feedback=True),
    powersgd_row("powersgd-1", 1),
    powersgd_row("powersgd-4", 4),
    powersgd_row("powersgd-2-plain", 2, error_feedback=False),
    powersgd_row("powersgd-1-ring", 1, "ring"),
    powersgd_row("powersgd-2-refresh", 2, refresh=2),
    powersgd_row("powersgd-2-ef21", 2, error_feedback=EF21()),
    powersgd_row("powersgd-2-decay", 2, error_feedback=Feedback(decay=0.9)),
    quantized_powersgd_row("powersgd-2-qsgd", 2, 8, 16),
    qsgd_row("qsgd-4", 4, 64),
    qsgd_row("qsgd-2", 2, 32),
    qsgd_row("qsgd-8-l2", 8, 64, norm="l2"),
    qsgd_row("qsgd-4-ef", 4, 64, error_feedback=True),
    qsgd_row("qsgd-2-l2-ef", 2, 32, norm="l2", error_feedback=True),
    qsgd_row("qsgd-4-ef21", 4, 64, error_feedback=EF21()),
    qsgd_row("qsgd-4-shuffle", 4, 64, "shuffle"),
    qsgd_row("qsgd-2-ef-shuffle", 2, 32, "shuffle", error_feedback=True),
    qsgd_row("qsgd-4-ring", 4, 64, "ring"),
    qsgd_row("qsgd-4-ef-ring", 4, 64, "ring", error_feedback=True),
    qsgd_row("qsgd-elias", 4, 64, norm="l2", code="elias"),
    qsgd_row("qsgd-elias-shuffle", 4, 64, "shuffle", error_feedback=True, norm="l2", code="elias"),
    # Noise takes more than a bit an element.
    qsgd_row("qsgd-elias-full", 4, 64, norm="l2", code="elias", capacity=1)._replace(beside=("two", *TINY)),
    shared_row("qsgd-shared", 4, 64, "psum"),
    shared_row("qsgd-shared-ef-ring", 4, 64, "ring", error_feedback=True),
    gradiveq_row("gradiveq", Cycle(1, 3, 3), 16, 8),
    # Slices that do not tile the leaves, in groups that do not divide the slices.
    gradiveq_row("gradiveq-ef", Cycle(1, 3, 3, settling=1), 20, 10, 7, error_feedback=True),
    gradiveq_row("gradiveq-energy", Cycle(0, 5, 2), 64, select="energy", max_loss=0.4),
    gradiveq_row("gradiveq-holdout", Cycle(0, 5, 2), 64, select="holdout", max_loss=0.9),
    gradiveq_row("gradiveq-ring", Cycle(0, 2, 3), 16, 16, aggregate="ring"),
    quantized_gradiveq_row("gradiveq-qsgd", Cycle(1, 3, 3), 16, 8, 4, 32),
    onebit_row("onebit", "gather")._replace(beside=("two", *TINY)),
    onebit_row("onebit-shuffle", "shuffle"),
    onebit_row("onebit-mean", "shuffle", threshold="mean", second_residual=True),
    adaptive_row("adaptive", "gather"),
    adaptive_row("adaptive-shuffle", "shuffle", sample=True),
    adaptive_row("adaptive-column", "shuffle", threshold_scope="column"),
    coded_row("topk", topk, decoders.topk(0.1), size_topk(0.1), "gather", fraction=0.1)._replace(beside=()),
    coded_row("topk-shuffle", topk, decoders.topk(0.1), size_topk(0.1), "shuffle", fraction=0.1),
    coded_row("topk-ef21", topk, decoders.topk(0.1), size_topk(0.1), "shuffle", fraction=0.1, error_feedback=EF21()),
    transformed_row(qsgd_row("qsgd-4-hadamard", 4, 64, "shuffle", error_feedback=True), "hadamard", 32),
    transformed_row(
        coded_row("topk-dct", topk, decoders.topk(0.1), size_topk(0.1), "gather", fraction=0.1), "dct", 16
    )._replace(beside=()),
    chunks_row("topk-chunks", "gather", 64, 8),
    chunks_row("topk-chunks-shuffle", "shuffle", 64, 8),
    # No square: leaves are flat, and the low bits of places do not fill bytes.
    chunks_row("topk-chunks-flat", "shuffle", 45, 10, error_feedback=EF21()),
    chunks_row("topk-chunks-sigma", "gather", 64, 8, 2, "sigma"),
    chunks_row("topk-chunks-whole", "gather", 64, 8, None),
    chunks_row("topk-chunks-all", "shuffle", 64, 64),
    float4_row("float4", 64, "gather"),
    float4_row("float4-ef", 64, "gather", error_feedback=True),
    float4_row("float4-shuffle", 32, "shuffle"),
    subset_row("randomk", randomk, 0.1),
    subset_row("randomk-plain-ring", randomk, 0.1, "ring", error_feedback=False),
    quantized_subset_row("randomk-qsgd", randomk, 0.1, 8, 16),
    subset_row("randomblock", randomblock, 0.1),
    coded_row("signnorm", signnorm, decoders.signnorm, size_signnorm, "gather")._replace(beside=("two", "small")),
    coded_row("signnorm-shuffle", signnorm, decoders.signnorm, size_signnorm, "shuffle"),
    coded_row("signnorm-vote", signnorm, decoders.signnorm, size_signnorm, "shuffle", majority=True),
    coded_row("statistical", statistical, decoders.statistical, size_statistical, "gather")._replace(
        beside=("two", *TINY)
    ),
    coded_row("statistical-shuffle", statistical, decoders.statistical, size_statistical, "shuffle"),
    switched_powersgd_row("accordion-powersgd", (4, 1), ACCORDION),
    switched_coded_row("accordion-topk", topk, (0.3, 0.1), decoders.topk, size_topk, "shuffle", ACCORDION),
    switched_coded_row(
        "accordion-qsgd", level_of_qsgd, (8, 2), gained, lambda bits: size_qsgd(bits, 32), "gather", ACCORDION, 32
    ),
    accordion_gradiveq_row("accordion-gradiveq", Cycle(0, 3, 5), 32, 16, 32),
    switched_powersgd_row("scheduled-powersgd", (1, 4), by_schedule(grows)),
    switched_coded_row(
        "scheduled-topk", topk, (0.3, 0.1), decoders.topk, size_topk, "gather", by_schedule(falls)
    )._replace(beside=()),
]
BY_ID = {row.id: row for row in ROWS}
# What real processes train with: each collective, and each way to choose what is sent.
AMONG_PROCESSES = [
    BY_ID[id] for id in ("none-ring", "powersgd-4", "qsgd-4", "qsgd-elias-shuffle", "gradiveq-ef", "accordion-powersgd")
]
# One row of each algorithm, where a law does not depend on the settings.
EACH = [
    BY_ID[id]
    for id in (
        "none",
        "cast-f16",
        "powersgd-4",
        "qsgd-4",
        "qsgd-4-ef",
        "qsgd-elias-shuffle",
        "gradiveq",
        "gradiveq-ef",
        "onebit-mean",
        "adaptive-shuffle",
        "topk-shuffle",
        "topk-chunks",
        "float4",
        "statistical-shuffle",
        "randomk",
        "signnorm",
        "accordion-powersgd",
        "scheduled-powersgd",
    )
]
