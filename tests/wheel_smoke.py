"""What `make wheel` runs where nothing but the wheel is installed: that it has all it needs, and nothing more.

python -I tests/wheel_smoke.py
"""

import importlib
import importlib.metadata
import importlib.resources
import math
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax

# absl comes with optax; this library, and what it calls of optax's from here on, does without.
if __name__ == "__main__":  # pytest imports this file too, to look for doctests
    absl = [name for name in sys.modules if name.split(".")[0] == "absl"]
    sys.modules |= dict.fromkeys([*absl, "absl", "chex", "flax", "orbax"])

import gradcomp_jax as gcj

CODECS = {"none": {}, "powersgd": {"min_size": 0}, "topk": {}, "qsgd": {"min_size": 0}, "signnorm": {}}


def contents():
    """The wheel holds the library alone, with its data and its license, and asks for jax and optax alone."""
    package, files = importlib.resources.files("gradcomp_jax"), importlib.metadata.files("gradcomp-jax")
    assert pathlib.Path(gcj.__file__).is_relative_to(sys.prefix), gcj.__file__
    assert {path.parts[0].partition("-")[0] for path in files} == {"gradcomp_jax"}, files
    assert (package / "py.typed").is_file()
    assert {"a100.txtpb", "b200.txtpb", "h100.txtpb"} <= {path.name for path in (package / "gpus").iterdir()}
    assert any(path.name == "LICENSE" for path in files)
    required = [line for line in importlib.metadata.requires("gradcomp-jax") if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in required) == ["jax", "optax"], required


def modules():
    """All of them can be imported, but for what draws, which is the extra's."""
    for module in pkgutil.walk_packages(gcj.__path__, "gradcomp_jax."):
        if module.name != "gradcomp_jax.picture":
            importlib.import_module(module.name)


def step(name, settings):
    """One step of training on two workers."""
    tx = optax.chain(gcj.CODECS[name](**settings), optax.sgd(0.1))
    loss_fn = lambda params, batch: jnp.mean((batch @ params["w"] - 1) ** 2)  # noqa: E731
    params, batch = {"w": jnp.zeros((64, 64))}, jax.random.normal(jax.random.key(0), (8, 64))
    train = gcj.simulate(loss_fn, tx, workers=2)
    after, state, loss = train(params, gcj.init(tx, params, 2), batch)
    assert math.isclose(loss, 1, rel_tol=1e-5), loss
    assert loss_fn(after, batch) < 1, name
    return gcj.wire_bits(state).last


def main():
    """Prints the last line only where all holds."""
    contents()
    modules()
    bits = {name: step(name, settings) for name, settings in CODECS.items()}
    assert all(0 < sent < bits["none"] for name, sent in bits.items() if name != "none"), bits
    certify = subprocess.run([sys.executable, "-I", "-m", "gradcomp_jax.certify", "--help"], capture_output=True)
    assert certify.returncode == 0, certify.stderr
    assert b"--target" in certify.stdout
    print(f"The wheel works on Python {sys.version.split()[0]}, jax {jax.__version__}, optax {optax.__version__}.")


if __name__ == "__main__":
    main()
