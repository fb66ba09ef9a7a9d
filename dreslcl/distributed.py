"""The few collective operations that several ranks need; with one rank each is a no-op. Started by torchrun only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from .common import rank_and_world

TIMEOUT = timedelta(hours=12)  # a rank may wait for another one that has more tiles to fill the bank with


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes what all share."""
        return self.rank == 0

    def gather_rows(self, local: Float[Tensor, "b E"], sizes: Sequence[int]) -> Float[Tensor, "B E"]:
        """All ranks' rows in rank order; gradient flows through this rank's own.

        Each rank computes the whole loss and keeps the gradient of its own rows: summed over ranks by `sum_gradients`
        that is the gradient of one process with all rows, and nothing needs to be sent back.
        """
        if self.world == 1:
            return local
        padded = local.new_zeros(max(sizes), local.shape[1])
        padded[: len(local)] = local.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([local if r == self.rank else part[:size] for r, (part, size) in enumerate(zip(parts, sizes))])

    def own_share(self, shared: Tensor) -> Tensor:
        """A parameter that enters the loss directly: same value, gradient divided by the number of ranks (each has all of it)."""
        return shared if self.world == 1 else shared / self.world + (shared * (1 - 1 / self.world)).detach()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up gradients over ranks, in place."""
        if self.world == 1:
            return
        learning = [p for p in parameters if p.grad is not None]  # the same on all ranks; a zero would let AdamW decay what is frozen
        flat = torch.cat([p.grad.reshape(-1) for p in learning])
        dist.all_reduce(flat)
        for p, part in zip(learning, flat.split([p.numel() for p in learning])):
            p.grad.copy_(part.view_as(p))

    def collect(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order (between the ranks of one run only)."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment; alone without it."""
    rank, world = rank_and_world()
    if world == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(rank, world)
    finally:
        dist.destroy_process_group()
