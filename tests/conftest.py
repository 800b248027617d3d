"""Eight CPU devices in one process, set before jax is first used."""

import os

# LAPACK threads of emulated devices get in each other's way; read once, when the library is loaded.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling. LLVM's optimisations are left out; those of HLO, which decide on the
# collectives, are not.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# What the library adds and multiplies, it has cast on purpose.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Draws are fixed, so that a failure here is a failure everywhere; examples compile, hence no deadline.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items):
    """For pytest-xdist's --dist=loadgroup: tests of a file, or of a row of the table, share compiled programs."""
    for item in items:
        file, row = item.nodeid.split("::")[0], getattr(item, "callspec", None) and item.callspec.params.get("row")
        item.add_marker(pytest.mark.xdist_group(f"{file}-{getattr(row, 'id', '')}"))
