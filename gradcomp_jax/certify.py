"""The bytes that a step will send on hardware that is not there: compiles the step for it, and reads the program.

    python -m gradcomp_jax.certify module:function --target=v5e:2x4 --slices=2
    python -m gradcomp_jax.certify module:function --target=h100:2x8 --json --plot=schedule.png

`function(mesh)` returns a jitted step and its arguments, which are arrays or their shapes. For example:
`lambda mesh: (train_step(loss_fn, tx, mesh), shapes(tx, params, batch, mesh))`. The mesh has the axes "node" and
"local".

The compilers are wheels of jax's own version. pip install "gradcomp_jax[certify]" installs libtpu for TPUs, and
jax-cuda12-plugin and jax-cuda12-pjrt for GPUs, which need neither CUDA nor a GPU. Set JAX_PLATFORMS=cpu, so that jax
does not look for the devices.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax import known
from gradcomp_jax.exchange.bits import Links, WireCount, wire_bits
from gradcomp_jax.hlo import Collective, Span, collective_bytes, schedule
from gradcomp_jax.mesh import make_mesh
from gradcomp_jax.placing import global_init
from gradcomp_jax.sharding import state_specs

# Smaller differences and messages, in bytes, are not reported.
LITTLE = 4096
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "collective_permute")
# Descriptions of GPUs, from XLA (openxla/xla, gpu/target_config/specs).
GPUS = pathlib.Path(__file__).parent / "gpus"
QUANTISED = "xla_tpu_quantized_all_reduce_level"


class Finding(NamedTuple):
    """A surprise: the program differs from the written one, or it does something that costs too much.

    Attributes:
      code: the kind.
      text: the surprise, and the way out.
    """

    code: str
    text: str


class Sent(NamedTuple):
    """A collective of the compiled program.

    Attributes:
      collective: the collective, from `collective_bytes`.
      link: "between" slices or nodes, or "inside" them.
      span: its start and end in the program; None in a called computation.
    """

    collective: Collective
    link: str
    span: Span | None


class Report(NamedTuple):
    """The bytes of a step.

    Attributes:
      target: the hardware that the step was compiled for.
      sent: the collectives, in the order of the program.
      declared: the bytes by link that `wire_bits` will count; empty if the arguments do not determine them.
      temporaries: the bytes of memory for temporaries.
      findings: surprises.
      work: the places of other work in the program; for each place, whether it multiplies matrices.
    """

    target: str
    sent: list[Sent]
    declared: dict[str, float]
    temporaries: int
    findings: list[Finding]
    work: dict[int, bool]

    @property
    def totals(self) -> dict[str, float]:
        """The bytes that a device sends by the ring laws, by link; all branches of a conditional count."""
        of = lambda link: sum(x.collective.ring_bytes for x in self.sent if x.link == link)  # noqa: E731
        return {link: of(link) for link in ("between", "inside")}

    @property
    def overlapped(self) -> float:
        """The share of the bytes between nodes that have other work beside them; 1 if there are none."""
        between = [x for x in self.sent if x.link == "between"]
        beside = sum(x.collective.ring_bytes for x in between if x.span is not None and x.span.work)
        return beside / total if (total := self.totals["between"]) else 1.0

    def __str__(self) -> str:
        lines = [f"{'link':8} {'collective':19} {'type':9} {'bytes sent':>13}  {'of':>3}  schedule"]
        for x in self.sent:
            c = x.collective
            lines.append(f"{x.link:8} {c.kind:19} {c.dtype:9} {c.ring_bytes:13,.0f}  {c.workers:3}  {_when(x)}")
        for link, total in self.totals.items():
            said = f", wire_bits counts {self.declared[link]:,.0f}" if link in self.declared else ""
            lines.append(f"{link}: {total:,.0f} bytes from each device{said}")
        lines.append(f"{self.target}: {self.temporaries:,} bytes of temporaries")
        lines += [f"{finding.code}: {finding.text}" for finding in self.findings] or ["nothing was found"]
        return "\n".join(lines)

    def as_json(self) -> str:
        """The report as JSON, for programs."""
        rows = [
            x.collective._asdict() | {"link": x.link, "span": x.span and x.span._asdict(), "groups": None}
            for x in self.sent
        ]
        told = {"target": self.target, "totals": self.totals, "declared": self.declared}
        return json.dumps(
            told | {"temporaries": self.temporaries, "sent": rows, "findings": [x._asdict() for x in self.findings]}
        )


def _when(x: Sent) -> str:
    if x.span is None:
        return "in a loop, branch or fusion"
    return "synchronous" if x.span.done == x.span.start else f"asynchronous, {x.span.work} operations beside it"


def absent_mesh(target: str, slices: int = 1, axes: tuple[str, str] = ("node", "local")) -> Mesh:
    """A mesh to compile for, of devices that are not there, or of CPUs.

    Args:
      target: "h100:2x8" (hosts x devices), "a100:2x8" or "b200:2x8"; "mine.txtpb:2x8", with a file of XLA that
        describes another GPU; a TPU's topology such as "v5e:2x4"; or "cpu:2x4", emulated devices, which are there.
      slices: the number of slices of that topology, for a TPU.
      axes: the names of the slow axis and the fast one.

    Raises:
      ValueError: `certify` or the compiler does not understand `target`.
      ImportError: the compiler is not installed.
    """
    kind, _, shape = target.rpartition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(f"target={target!r} must be such as 'h100:2x8', 'v5e:2x4' or 'cpu:2x4'")
    sizes = [int(x) for x in shape.split("x")]
    described = pathlib.Path(kind if kind.endswith(".txtpb") else GPUS / f"{kind}.txtpb")
    if kind.endswith(".txtpb") and not described.exists():
        raise ValueError(f"target={target!r}: there is no file {kind!r}, in which XLA describes a GPU")
    if (kind == "cpu" or described.exists()) and len(sizes) != 2:
        raise ValueError(f"target={target!r} must say how many hosts of how many devices: {kind}:2x8")
    if kind == "cpu":
        return make_mesh(dict(zip(axes, sizes, strict=True)))
    if described.exists():
        options = {"target_config": described.read_text(), "topology": f"1x{sizes[0]}x{sizes[1]}"}
        devices = _topology(target, "jax_cuda12_plugin", platform="cuda", **options)
        return Mesh(np.array(devices).reshape(sizes), axes)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = _topology(target, "libtpu", topology_name=target, platform="tpu", num_slices=slices)
    found = sorted(devices, key=lambda device: (getattr(device, "slice_index", 0) or 0, device.id))
    return Mesh(np.array(found).reshape(slices, -1), axes)


def _topology(target: str, compiler: str, **options: Any) -> Sequence[Any]:
    if importlib.util.find_spec(compiler) is None:
        raise ImportError(
            f"target={target!r} needs {compiler}, of the version of jax, {jax.__version__}: pip install "
            "'gradcomp_jax[certify]'"
        )
    try:
        return topologies.get_topology_desc(**options).devices
    except RuntimeError as error:  # with the compiler's own words
        raise ValueError(f"target={target!r} is none that {compiler} can compile for here: {error}") from error


def shapes(tx: optax.GradientTransformation, params: Any, batch: Any, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The arguments of a `train_step` as shapes on a mesh, whose devices need not be there.

    Args:
      tx: the optimiser.
      params: the parameters, or their shapes.
      batch: the batch of all workers, or its shapes.
      mesh: the mesh.

    Returns:
      Parameters, the optimiser's state in its global form, and the batch.
    """
    on = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    state = jax.eval_shape(functools.partial(global_init, tx, mesh), params)
    everywhere = lambda x: on(x, P())  # noqa: E731
    split = lambda x: on(x, P(mesh.axis_names))  # noqa: E731
    return (
        jax.tree.map(everywhere, params),
        jax.tree.map(on, state, state_specs(tx, params)),
        jax.tree.map(split, batch),
    )


def certify(
    step: Any,
    args: Sequence[Any],
    mesh: Mesh,
    *,
    compiler_options: dict[str, Any] | None = None,
) -> Report:
    """Compiles a step for the devices of a mesh, which need not be there, and reports its bytes.

    Args:
      step: a jitted function, such as the result of `train_step`.
      args: the step's arguments, or their shapes: `jax.ShapeDtypeStruct`s with shardings on the mesh. If a codec has
        several kinds of steps, the report has its count only if the state's counts of steps are arrays.
      mesh: a mesh from `absent_mesh`; its first axis is the slow one.
      compiler_options: options for XLA, such as those of `compiler_options(platform)`.

    Returns:
      A report; `str` of it is a table.
    """
    program = step.trace(*args)
    lowered = program.lower()
    compiled = lowered.compile(compiler_options=compiler_options)
    platform = mesh.devices.flat[0].platform
    per_node = mesh.size // mesh.devices.shape[0]
    order = schedule(compiled)
    link = lambda c: "between" if c.crosses(per_node) else "inside"  # noqa: E731
    sent = [Sent(c, link(c), order.spans.get(c.name)) for c in collective_bytes(compiled)]
    traced = list(_traced(lowered.as_text(), mesh))
    findings = [
        *_narrow_types(platform, traced),
        *_scattered(sent, traced),
        *_merged(sent, traced),
        *_repeated(program.jaxpr.jaxpr, mesh),
        *_quantised(platform, compiler_options or {}),
    ]
    memory = compiled.memory_analysis()
    target = f"{mesh.devices.flat[0].device_kind}, {' x '.join(map(str, mesh.devices.shape))}"
    return Report(target, sent, declared(program, args), memory.temp_size_in_bytes, findings, order.work)


def declared(program: Any, args: Sequence[Any]) -> dict[str, float]:
    """The bytes that a step's state will count.

    Args:
      program: the result of `step.trace(*args)`.
      args: the step's arguments, or their shapes.

    Returns:
      The bytes by link, "between" and, with `across`, "inside"; empty if they depend on unknown values.
    """
    values = known.outputs(program.jaxpr, jax.tree.leaves(tuple(args)))
    values = jax.tree.unflatten(jax.tree.structure(program.out_info), values)
    is_count = lambda x: isinstance(x, WireCount)  # noqa: E731
    last = lambda x: WireCount(x.last(), x.last()) if is_count(x) else x  # noqa: E731
    try:
        counted = jax.tree.map(last, values, is_leaf=is_count)
    except known.Unknown:
        return {}
    found = jax.tree.leaves(counted, is_leaf=lambda x: isinstance(x, WireCount | Links))
    links = ["between"] * any(isinstance(x, WireCount | Links) for x in found)
    links += ["inside"] * any(isinstance(x, Links) for x in found)
    return {link: wire_bits(counted, link).last / 8 for link in links}


class _Traced(NamedTuple):
    """A collective as it was written."""

    kind: str
    dtype: str
    size: int
    crosses: bool  # goes between slices or nodes


def _traced(text: str, mesh: Mesh) -> Iterator[_Traced]:
    """The collectives of a program before it is compiled; their groups are lists, or in jax 0.12 axes."""
    slow, per_node = mesh.axis_names[0], mesh.size // mesh.devices.shape[0]
    names = "|".join(COLLECTIVES)
    for found in re.finditer(rf'"stablehlo\.({names})"\(.*? : \((tensor<[^)]*)\) -> ', text, re.S):
        axes = re.findall(r'axis_ref<name = "(\w+)"', found[0])
        groups = re.search(r"replica_groups = dense<(\[\[.*?\]\])>", found[0])
        parts = json.loads(groups[1]) if groups else []
        crosses = slow in axes or any(len({device // per_node for device in part}) > 1 for part in parts)
        for dims, dtype in re.findall(r"tensor<((?:\d+x)*)(\w+)>", found[2]):
            bits = int(re.sub(r"\D", "", dtype.partition("E")[0]) or 8)
            size = math.prod(int(x) for x in dims.split("x") if x) * bits // 8
            yield _Traced(found[1], dtype, size, crosses)


def _narrow_types(platform: str, traced: list[_Traced]) -> Iterator[Finding]:
    """Finds types that take more bits on the wire than they have."""
    if platform not in ("gpu", "cuda"):
        return
    for t in traced:
        if t.dtype in ("i4", "ui4", "i2", "ui2"):
            yield Finding(
                "int4", f"{t.kind} of {t.size:,} bytes of {t.dtype} sends a whole byte each on GPUs: pack them in uint8"
            )
        if t.kind in ("all_reduce", "reduce_scatter") and t.dtype in ("i16", "ui16"):
            yield Finding(
                "int16",
                f"a sum of {t.size:,} bytes of {t.dtype} is widened to 32 bits on GPUs, and sends twice as much: sum "
                "pairs in the halves of an int32, or use aggregate='shuffle'",
            )


def _scattered(sent: list[Sent], traced: list[_Traced]) -> Iterator[Finding]:
    """Finds reduce-scatters that XLA replaced with other collectives."""
    asked = sum(t.size for t in traced if t.kind == "reduce_scatter")
    got = sum(x.collective.operand_bytes for x in sent if x.collective.kind == "reduce-scatter")
    if asked - got > LITTLE:
        yield Finding(
            "reduce-scatter",
            f"of {asked:,} bytes to be reduce-scattered {asked - got:,} go by another collective, such as an "
            "all-reduce, which sends twice as much: scatter matrices by rows, not vectors",
        )


def _merged(sent: list[Sent], traced: list[_Traced]) -> Iterator[Finding]:
    """Finds collectives that XLA merged into one."""
    asked = sum(t.crosses for t in traced)
    got = sum(x.link == "between" for x in sent)
    if 0 < got < asked:
        yield Finding(
            "merged",
            f"{asked} collectives between slices or nodes became {got}, and each waits for the last of its gradients: "
            "give compiler_options(platform)",
        )


def _repeated(jaxpr: Any, mesh: Mesh) -> Iterator[Finding]:
    """Finds equal data that all devices of a slice or node send; only types show it, so the step must be checked."""
    slow, *fast = mesh.axis_names
    for equation in known.equations(jaxpr):
        axes = equation.params.get("axes", equation.params.get("axis_name"))
        axes = (axes,) if isinstance(axes, str) else axes
        if equation.primitive.name.endswith("axis_index") or not axes or set(axes) != {slow}:
            continue
        for x in equation.invars:
            varying, size = x.aval.mat.varying, x.aval.size * x.aval.dtype.itemsize
            if slow in varying and not set(fast) & varying and size > LITTLE:
                yield Finding(
                    "repeated",
                    f"each device of a slice or node sends the same {size:,} bytes by {equation.primitive.name} over "
                    f"{slow!r}: across(codec, slow={slow!r}, fast={fast[0]!r}) has each send its share",
                )


def _quantised(platform: str, options: dict[str, Any]) -> Iterator[Finding]:
    """Finds the quantised all-reduce of the TPU compiler."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "") + " " + os.environ.get("XLA_FLAGS", "")
    said = re.search(rf"--{QUANTISED}=(\w+)", flags)
    level = str(options.get(QUANTISED, said[1] if said else "0"))
    if platform == "tpu" and level != "0":
        yield Finding(
            "quantised",
            f"{QUANTISED}={level}: the compiler quantises all-reduces by itself, so that shapes do not tell bytes, and "
            "sums are not exact: leave it out",
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m gradcomp_jax.certify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("program", help="module:function, of a mesh, which returns a jitted step and its arguments")
    parser.add_argument("--target", default="cpu:2x4", help="such as v5e:2x4, h100:2x8 or cpu:2x4")
    parser.add_argument("--slices", type=int, default=1, help="of a TPU")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--plot", metavar="FILE", help="a picture of the schedule, such as schedule.png; of matplotlib")
    given = parser.parse_args(argv)
    module, _, function = given.program.partition(":")
    if not function:
        parser.error(f"{given.program!r} must be module:function")
    if given.target.startswith("cpu"):
        sizes = [int(x) for x in re.findall(r"\d+", given.target)]
        jax.config.update("jax_num_cpu_devices", math.prod(sizes))
    try:
        mesh = absent_mesh(given.target, given.slices)
    except (ImportError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    try:
        program = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        parser.exit(1, f"error: {given.program!r} is not found from here: {error}\n")
    step, args = program(mesh)
    report = certify(step, args, mesh)
    print(report.as_json() if given.json else report)
    if given.plot:
        _plot(parser, report, given.plot)


def _plot(parser: argparse.ArgumentParser, report: Report, path: str) -> None:
    try:
        from gradcomp_jax.picture import picture  # matplotlib is needed for nothing else

        picture(report).savefig(path, dpi=150)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1, f"error: --plot={path}: {error}\n")


if __name__ == "__main__":
    main()
