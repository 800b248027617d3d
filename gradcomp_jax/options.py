"""Options for XLA that let the exchange overlap with a backward pass."""

from gradcomp_jax.arguments import shown

_OPTIONS = {
    "cpu": {},
    "gpu": {
        # Each combines collectives up to so many bytes; combined ones wait for the last of their gradients.
        "xla_gpu_all_reduce_combine_threshold_bytes": "1",
        "xla_gpu_all_gather_combine_threshold_bytes": "1",
        "xla_gpu_reduce_scatter_combine_threshold_bytes": "1",
        # The number of collectives that may be on their way at once; with 1, the next one waits.
        "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
    },
    "tpu": {
        # Between slices: the number of all-reduces that become one.
        "xla_jf_crs_combiner_threshold_count": "1",
    },
}


def compiler_options(platform: str) -> dict[str, str]:
    """XLA's options that keep the parts of an exchange apart, so that they can overlap with a backward pass.

    Args:
      platform: "gpu", "tpu" or "cpu", such as `jax.default_backend()`.

    Returns:
      Options for `train_step(..., compiler_options=)`, or for `jax.jit`. All other options keep XLA's defaults.

    Raises:
      ValueError: it is none of these.

    >>> import gradcomp_jax as gcj
    >>> gcj.compiler_options("tpu")
    {'xla_jf_crs_combiner_threshold_count': '1'}
    """
    kind = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if kind not in _OPTIONS:
        raise ValueError(f"platform={shown(platform)} must be one of {', '.join(map(repr, _OPTIONS))}")
    return dict(_OPTIONS[kind])
