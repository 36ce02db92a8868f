"""Several processes that train one trial, data parallel: each on its share of every batch, with weights of its own that
stay alike. What they tell each other is here, over torch's default process group; each function is the identity in one
process. Tensors that ranks exchange have the same shape on all of them."""

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

T = TypeVar("T")

_images: ContextVar[int] = ContextVar("images")
"""Images of a part of a step that are this rank's."""


# ---------------------------------------------------------------------------------------------------- the group


def rank() -> int:
    """Which of the processes this one is; rank 0 is the one that makes records and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def group(
    *, rank: int, workers: int, address: str, device: torch.device, timeout_seconds: float = 1800.0
) -> Iterator[None]:
    """This process is one of `workers` as long as the context lasts; entered by all of them, whoever is first waits.

    A process that ends, by whatever way, closes its connections, and the others raise in their next exchange. The
    timeout is for one that hangs or whose machine is gone, and must be longer than what one does while the others
    wait: reading its images for the first time, or writing a checkpoint.

    Nothing leaves the machine if the host is a loopback address. If not, gloo listens where the machine's own name
    leads, or at the interface that GLOO_SOCKET_IFNAME names. On CUDA each process needs a GPU of its own, the current
    device.

    Args:
        address: host:port at which rank 0 listens, and nowhere else, until it leaves.

    Raises:
        OSError: rank 0 cannot listen at this address.
        RuntimeError: not all came in time, or, later, one is gone.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_seconds)
    # A store that opens its own socket would listen on all interfaces.
    listener = socket.create_server((host, int(port))).detach() if rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), workers, rank == 0, timeout, master_listen_fd=listener
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _gloo_at(host):
        dist.init_process_group(backend, store=store, rank=rank, world_size=workers, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _gloo_at(host: str) -> Iterator[None]:
    """Keeps gloo on the loopback interface if the host is there; only its environment variable can."""
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    if given or not socket.gethostbyname(host).startswith("127."):
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


# ------------------------------------------------------------------------------------------------ what is exchanged


def means(tensors: Sequence[Float[Tensor, "..."]]) -> list[Tensor]:
    """Each tensor's mean over ranks, all in one message; the same bits on every rank."""
    if workers() == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.div_(workers()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def mean(tensor: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Its mean over ranks: that of the whole batch if it is one over images, of which all have equally many."""
    return means([tensor])[0]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each gradient becomes the mean over ranks, that of the whole batch's loss.

    By hand and not by DistributedDataParallel, which wraps a network that is called once, by `forward`, and whose
    parameters all get gradients: methods call parts of the student, hold some of its parameters, and work a batch
    through in several parts, after the last of which alone there is something to exchange.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter, gradient in zip(moved, means([p.grad for p in moved if p.grad is not None]), strict=True):
        parameter.grad = gradient


def gather(tensor: Tensor, dim: int) -> Tensor:
    """All ranks' tensors, side by side along `dim` in the order of ranks; gradients flow back to each of them.

    A gradient is then that of the sum of all ranks' losses, as a tensor's is that has a part in all of them.
    """
    if workers() == 1:
        return tensor
    return torch.cat(list(_Stacked.apply(tensor)), dim=dim)


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Float[Tensor, "*S"]) -> Float[Tensor, "W *S"]:
        stacked = tensor.new_empty(workers(), *tensor.shape)
        dist.all_gather(list(stacked), tensor.contiguous())
        return stacked

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "W *S"]) -> Float[Tensor, "*S"]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[rank()]


def in_turn(items: Sequence[T]) -> list[T]:
    """All ranks' items in order, on every rank; rank r has made the r-th, the (r + workers)-th and so on."""
    if workers() == 1:
        return list(items)
    of_ranks: list[Any] = [None] * workers()
    dist.all_gather_object(of_ranks, items)
    return [item for turn in zip_longest(*of_ranks) for item in turn if item is not None]


def of_first(value: T) -> T:
    """Rank 0's value, on every rank: what must be decided alike, though processors may differ in the last bit."""
    if workers() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# ------------------------------------------------------------------------------------------------- random numbers


@contextmanager
def draws(seed: int, *, images: int) -> Iterator[None]:
    """Torch's generators start at this seed, and are as they were afterwards; `images` of a part are this rank's."""
    _images.set(images)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def own(drawn: Tensor) -> Tensor:
    """The rows of this rank's images, of those that were drawn for all ranks, crop after crop, as one process would.

    Every rank draws for all, since torch's generators cannot skip what others need.
    """
    if workers() == 1:
        return drawn
    mine: Tensor = drawn.unflatten(0, (-1, workers(), _images.get()))[:, rank()]
    return mine.flatten(0, 1)
