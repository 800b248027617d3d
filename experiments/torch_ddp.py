"""PyTorch's side of `experiments.end_to_end`, which starts it: DistributedDataParallel over gloo, on CPUs.

It trains the same models from the same weights on the same batch, by SGD with momentum, in three ways: alone (local),
with all gradients summed (ddp), and with PyTorch's powerSGD_hook (powersgd). It needs torch and numpy alone, so it may
run by another Python than the other experiments. Each line that it reads, such as "powersgd 5", asks for so many steps
of a way. It answers in lines of JSON, the first of which describes it. It ends when its input ends.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

WAYS = ("local", "ddp", "powersgd")


class Block(nn.Module):
    """A residual block, [N, inputs, H, W] -> [N, filters, H / stride, W / stride]."""

    def __init__(self, inputs: int, filters: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False), norm(filters)
        self.conv2, self.norm2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False), norm(filters)
        self.projection = nn.Sequential()
        if inputs != filters:
            self.projection.add_module("conv", nn.Conv2d(inputs, filters, 1, stride, bias=False))
            self.projection.add_module("norm", norm(filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.projection(x))


class ResNet18(nn.Module):
    """ResNet-18 in its CIFAR form, images [N, 32, 32, 3] -> logits [N, 10]."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width)
        outputs = [width * 2**stage for stage in range(4) for _ in range(2)]
        pairs = zip([width, *outputs[:-1]], outputs, strict=True)
        self.blocks = nn.Sequential(*(Block(i, o, 1 if i == o else 2) for i, o in pairs))
        self.linear = nn.Linear(8 * width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(images.permute(0, 3, 1, 2).contiguous())))
        return self.linear(self.blocks(x).mean((2, 3)))


class Layer(nn.Module):
    """A transformer's attention and the network after it, [N, T, width] -> [N, T, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        attended = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """Layers between an embedding and its transpose, symbols [N, T] -> logits [N, T, symbols]."""

    def __init__(self, symbols: int, width: int, layers: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.blocks = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6, bias=False)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(self.blocks(self.embedding(symbols))), self.embedding.weight)


def norm(filters: int) -> nn.Module:
    """Batch normalization that keeps no running statistics, like the other side's."""
    return nn.BatchNorm2d(filters, track_running_stats=False)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Queries or keys [N, heads, T, size], turned by their places."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * frequencies
    a, b, sin, cos = x[..., :half], x[..., half:], angles.sin(), angles.cos()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def perceptron(width: int) -> nn.Module:
    """Two hidden layers, [N, 3072] -> logits [N, 10]."""
    return nn.Sequential(nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "perceptron": perceptron,
    "resnet18": ResNet18,
    "transformer": lambda width: Transformer(256, width, layers=6, heads=6),
}


def load(model: nn.Module, arrays: Any) -> None:
    """Gives a model the other side's weights.

    Args:
      model: the model.
      arrays: by path, such as "blocks/layers/0/conv1/kernel"; kernels are [..., inputs, outputs].
    """
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    state = {}
    for path in arrays:
        *module, leaf = [part for part in path.split("/") if part != "layers"]
        x = torch.tensor(arrays[path])
        x = x.permute(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)).contiguous() if leaf == "kernel" else x
        state[".".join([*module, names.get(leaf, leaf)])] = x
    model.load_state_dict(state)


class Training(NamedTuple):
    """A training that is under way.

    Attributes:
      network: the model, or DistributedDataParallel around it.
      optimizer: its optimiser.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        loss_of(self.network, x, labels).backward()
        self.optimizer.step()


def loss_of(network: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch."""
    return F.cross_entropy(network(x).flatten(0, -2), labels.flatten())


def training(way: str, model: nn.Module, args: argparse.Namespace) -> Training:
    """A training of a model in one of `WAYS`."""
    network = model
    if way == "ddp":
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if way == "powersgd":
        # One bucket: with several, gloo takes one bucket's messages for another's, and aborts.
        network = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=1000)
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=args.rank, start_powerSGD_iter=2)
        network.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return Training(network, torch.optim.SGD(network.parameters(), lr=args.lr, momentum=args.momentum))


def sent_by(interface: str) -> int:
    """The bytes that an interface has sent; 0 without one."""
    return int(pathlib.Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text()) if interface else 0


def timed(done: Training, batch: tuple[torch.Tensor, torch.Tensor], steps: int, interface: str) -> dict[str, float]:
    """The seconds that a step takes, of the slowest host; and the bytes that the interface sends in it."""
    dist.barrier()
    sent, began = sent_by(interface), time.perf_counter()
    for _ in range(steps):
        done.step(*batch)
    dist.barrier()
    return {"seconds": (time.perf_counter() - began) / steps, "counted": (sent_by(interface) - sent) / steps}


def main() -> None:
    """Answers until its input ends."""
    # Gloo prints on standard output. What this program answers has a file of its own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--arrays", required=True, help="a .npz of weights by path, with the batch: x and labels")
    parser.add_argument("--address", required=True, help="of the first process, with a port that is free there")
    parser.add_argument("--interface", default="", help="the network interface whose bytes are counted")
    for name in ("width", "processes", "process", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr", "momentum"):
        parser.add_argument(f"--{name}", type=float, required=True)
    args = parser.parse_args()

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    arrays = dict(np.load(args.arrays))
    batch = torch.from_numpy(arrays.pop("x")), torch.from_numpy(arrays.pop("labels")).long()
    models = {way: MODELS[args.model](args.width) for way in WAYS}
    for model in models.values():
        load(model, arrays)
    with torch.no_grad():
        loss = loss_of(models["local"], *batch).item()
    where = f"tcp://{args.address}"
    dist.init_process_group("gloo", init_method=where, rank=args.process, world_size=args.processes)
    trainings = {way: training(way, model, args) for way, model in models.items()}
    parameters = sum(x.numel() for x in models["local"].parameters())
    answer(torch=torch.__version__, threads=threads, parameters=parameters, loss=loss)
    for line in sys.stdin:
        way, steps = line.split()
        answer(**timed(trainings[way], batch, int(steps), args.interface))


if __name__ == "__main__":  # by end_to_end, so this is not in the list of programs
    main()
