"""Published figures of devices, and links by name."""

import re
from typing import NamedTuple

from gradcomp_jax.arguments import shown
from gradcomp_jax.planner.cost import Link

# What training reaches of a published rate. Llama 3 405B reached 38 to 43 % on H100s (arXiv 2407.21783, Table 4).
UTILISATION = 0.4
# What a codec reaches of a published memory bandwidth: assumed, not measured.
STREAMING = 0.5


class Device(NamedTuple):
    """A device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      flops_per_second: floating-point operations a second, in the type in which networks are trained there.
      bytes_per_second: bytes to and from its memory a second.
      inside: the link to the other devices of its host or slice.
      source: where the figures are from.
    """

    platform: str
    flops_per_second: float
    bytes_per_second: float
    inside: Link
    source: str

    def train_seconds(self, flops: float) -> float:
        """The seconds of a training step of so many operations."""
        return flops / (UTILISATION * self.flops_per_second)

    def codec_seconds(self, flops: float, size: float) -> float:
        """The seconds of a codec that does so many operations, and reads and writes `size` bytes."""
        return flops / (UTILISATION * self.flops_per_second) + size / (STREAMING * self.bytes_per_second)


DEVICES = {
    # 989.4 TFLOP/s dense in bfloat16, 3.35 TB/s, NVLink 900 GB/s in both directions together.
    "h100": Device(
        "gpu", 989.4e12, 3.35e12, Link(3.6e12, 5e-6, 1.0), "https://www.nvidia.com/en-us/data-center/h100/ (SXM)"
    ),
    # 312 TFLOP/s dense in bfloat16, 2.039 TB/s, NVLink 600 GB/s in both directions together.
    "a100": Device(
        "gpu", 312e12, 2.039e12, Link(2.4e12, 5e-6, 1.0), "https://www.nvidia.com/en-us/data-center/a100/ (SXM, 80 GB)"
    ),
    # 197 TFLOP/s in bfloat16, 819 GB/s, 400 GB/s between chips in both directions together.
    "v5e": Device("tpu", 197e12, 819e9, Link(1.6e12, 1e-6, 1.0), "https://docs.cloud.google.com/tpu/docs/v5e"),
    # Float32, measured for this library: matrices of 2048 rows, and a pass in place.
    "cpu": Device("cpu", 124e9, 23.5e9, Link(80e9, 1e-5, 1.0), "two cores of an AMD EPYC, measured for this library"),
}
"""Devices by name. Rates are for one direction of a link. Latencies of links inside a host are assumed."""

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def link_of(link: Link | str) -> Link:
    """A link, from a text such as "1gbit" or "1gbit 20ms"; without a latency it is 0.1 ms.

    Raises:
      ValueError: it is neither, or a rate or latency that no link has.
    """
    if isinstance(link, str):
        found = re.fullmatch(r"([\d.]+)\s*([kmg]bit)(?:/s)?(?:[\s,]+([\d.]+)\s*(us|ms|s))?", link.strip().lower())
        if not found:
            raise ValueError(f'link={link!r} must be a rate such as "1gbit", with a latency "1gbit 20ms", or a Link')
        rate, unit, latency, time = found.groups()
        link = Link(float(rate) * _UNITS[unit])
        link = link._replace(latency_seconds=float(latency) * _TIMES[time]) if latency else link
    if not isinstance(link, Link) or not link.bits_per_second > 0 or not link.latency_seconds >= 0:
        raise ValueError(f"link={shown(link)} must be a rate such as '1gbit', or a Link with a rate above 0")
    return link


def device_of(device: Device | str) -> Device:
    """A device, from its name in `DEVICES`.

    Raises:
      ValueError: there is none of this name.
    """
    if isinstance(device, Device):
        return device
    if device not in DEVICES:
        raise ValueError(f"device={shown(device)} must be one of {', '.join(DEVICES)}, or a Device")
    return DEVICES[device]
