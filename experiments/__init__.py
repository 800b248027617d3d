"""Experiments: each trains a real model with one codec after another, and tells its cost and its result."""

import importlib.util
import os
import sys

# Before numpy is first imported. The devices that a CPU emulates share its cores, and LAPACK's own threads then fight
# each other: 20 eigh(100) on each of 8 devices took 1 to 2.3 s with these threads, and 0.07 s without.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The packages of the library and of its extra "experiments", each with the name that it is imported by.
PACKAGES = {
    "jax": "jax",
    "optax": "optax",
    "absl-py": "absl",
    "docstring-parser": "docstring_parser",
    "flax": "flax",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "orbax-checkpoint": "orbax.checkpoint",
    "pooch": "pooch",
    "rich": "rich",
    "scikit-learn": "sklearn",
    "tensorboardX": "tensorboardX",
    "tqdm": "tqdm",  # for pooch's progress bar
}


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around the module is missing
        return False


if missing := [package for package, module in PACKAGES.items() if not _there(module)]:
    sys.exit(
        f"error: the experiments need {', '.join(missing)}, which {sys.executable} does not have: in "
        f"{os.path.dirname(__path__[0])} run pip install -e '.[experiments]', or use .venv/bin/python, which "
        "`make demo` sets up"
    )
