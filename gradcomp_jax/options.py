"""What XLA has to be told for the exchange to overlap with a backward pass."""

from gradcomp_jax.arguments import shown

_OPTIONS = {
    "cpu": {},
    "gpu": {
        # Each combines collectives up to so many bytes, which then wait for the last of their gradients.
        "xla_gpu_all_reduce_combine_threshold_bytes": "1",
        "xla_gpu_all_gather_combine_threshold_bytes": "1",
        "xla_gpu_reduce_scatter_combine_threshold_bytes": "1",
        # How many may be on their way at once; of one, the next waits.
        "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
    },
    "tpu": {
        # Between slices: how many all-reduces become one.
        "xla_jf_crs_combiner_threshold_count": "1",
    },
}


def compiler_options(platform: str) -> dict[str, str]:
    """XLA's options that keep the parts of an exchange apart, so that they overlap with a backward pass.

    Args:
      platform: "gpu", "tpu" or "cpu", such as `jax.default_backend()`.

    Returns:
      Options for `train_step(..., compiler_options=)`, or for `jax.jit`. Those that are not said are XLA's.

    Raises:
      ValueError: it is none of these.

    >>> from gradcomp_jax import compiler_options
    >>> compiler_options("tpu")
    {'xla_jf_crs_combiner_threshold_count': '1'}
    """
    kind = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if kind not in _OPTIONS:
        raise ValueError(f"platform={shown(platform)} must be one of {', '.join(map(repr, _OPTIONS))}")
    return dict(_OPTIONS[kind])
