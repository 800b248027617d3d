"""Eight CPU devices in one process, set before jax is first used."""

# ruff: noqa: E402, as jax reads the environment when it is imported

import gc
import importlib.metadata
import os
import tempfile

# LAPACK threads of emulated devices get in each other's way; read once, when the library is loaded.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling. LLVM's optimisations are left out, and XLA's newer way to write the loops of a
# fusion, which takes three times as long and which jax 0.12 cannot do without any more. Those of HLO, which decide on
# the collectives, are not.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
# Emulated devices can run collectives inside and outside a conditional in other orders otherwise, see docs/limits.md.
FLAGS.append("--xla_cpu_enable_concurrency_optimized_scheduler=false")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# What took long to compile is kept for the other processes of a run: those of pytest-xdist, and those that tests start.
# A run begins with nothing, so that nothing is kept from another jax, library or machine.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="gradcomp_jax-tests-")  # until this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

# Tracing makes many objects that live on, among which collections find little; and places in the code, for errors of
# the compiler, which are not read here.
gc.set_threshold(100_000, 20, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_num_cpu_devices", 8)
# What the library adds and multiplies, it has cast on purpose.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Draws are fixed, so that a failure here is a failure everywhere; examples compile, hence no deadline.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("tests")


TESTS_DONE = pytest.StashKey[int]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of a file, or of a row of the table, share compiled programs: each group runs in one process.

    By a scheduler of our own, as pytest-xdist 3.8's for its marks, `loadgroup`, finds none under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByRow(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _group(nodeid)

    return ByRow(config, log) if config.getvalue("dist") == "loadgroup" else None


def _group(nodeid):
    from tests.table import BY_ID

    file, _, parameters = nodeid.rstrip("]").partition("[")
    file = file.split("::")[0]
    if file.endswith("test_processes.py"):  # whose processes compute all rows
        return file
    rows = [id for id in BY_ID if f"-{id}-" in f"-{parameters}-"]
    return f"{file} {max(rows, key=len, default='')}"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Lets go of compiled programs between groups, when some hundreds of tests have compiled theirs.

    Each holds a dozen maps of memory; Linux gives a process 65,530, and XLA crashes when there are no more.
    """
    done = item.session.stash.setdefault(TESTS_DONE, 0) + 1
    release = done >= 300 and (nextitem is None or _group(item.nodeid) != _group(nextitem.nodeid))
    item.session.stash[TESTS_DONE] = 0 if release else done
    if release:
        from gradcomp_jax.testing import contexts

        contexts.forget()
        jax.clear_caches()
        gc.collect()
