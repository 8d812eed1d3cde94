"""The ranks that share a set of SAEs: who holds which latents, and every collective between them.

Rank r of P holds the latents [cut_r, cut_{r+1}) of every per-latent tensor; parameters that belong to no single latent
are on all ranks, with the same values. `Ranks` is the only place that imports torch.distributed. One process is
`ALONE`: its collectives return what they were given, so that no caller asks how many ranks there are.

Every collective counts the bytes that this rank receives, by purpose, as the usual ring algorithms move them:

    sum        2 · (P − 1) / P · size          gather      (P − 1) · size of one piece
    exchange   (P − 1) / P · size              broadcast   size, on all but the source

Two properties decide what may be compared between runs of different P. Sums of float numbers over ranks depend on
their order, which a collective chooses. Where latents form a fixed number of blocks, sums are formed for each block and
added in the order of blocks (`sum_in_order`): the same bits for every P that divides the number of blocks, for more
bytes. Everything else is exact.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel.environment import LATENTS_PER_UNIT

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""torch 2.13 has renamed it."""

ANSWER_BYTES = 4096

ExchangeFormat = Literal["float32", "bfloat16"]


@dataclass
class Traffic:
    """What a rank has received since the start, and how long it took, by purpose."""

    received_bytes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time on the host. Work on a GPU runs later: there it is the time to enqueue it."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class Ranks:
    """The ranks of one placement group, as one of them sees them. Collectives must be called by all, in one order."""

    def __init__(
        self,
        rank: int,
        size: int,
        group: dist.ProcessGroup | None,
        blocks: int = 1,
        latents_per_unit: int = LATENTS_PER_UNIT,
        device: str | torch.device = "cpu",
        exchange: ExchangeFormat = "float32",
        group_index: int = 0,
    ) -> None:
        """`group` None is that of all ranks, on the host.

        `blocks` is the number of blocks of latents whose sums are added in order, a multiple of `size`.

        1: each rank sums over its latents as it likes, and a collective over ranks. `device` is that of the tensors
        in collectives. `exchange` is the format in which reconstructions cross ranks; float32: as they are.
        """
        if blocks != 1 and blocks % size:
            raise ValueError(f"{blocks} blocks of latents cannot be spread evenly over {size} ranks")
        self.rank = rank
        self.size = size
        self.blocks = blocks
        self.device = torch.device(device)
        self.reconstruction_dtype = torch.bfloat16 if exchange == "bfloat16" else None
        """Type of reconstructions between ranks; None for that of their numbers."""
        self.group_index = group_index
        """Number of the placement group."""
        self.traffic = Traffic()
        self._group = group
        self._latents_per_unit = latents_per_unit

    @property
    def is_alone(self) -> bool:
        """This process is the only one."""
        return self.size == 1

    @property
    def is_whole(self) -> bool:
        """This process holds all latents, and sums over them in any order."""
        return self.size == 1 and self.blocks == 1

    def latent_cuts(self, d_sae: int) -> list[int]:
        """Where d_sae latents are cut into those of the ranks, [P + 1] from 0 to d_sae."""
        return latent_cuts(d_sae, self.size, self._latents_per_unit)

    def latents(self, d_sae: int) -> range:
        """The latents that this rank holds."""
        cuts = self.latent_cuts(d_sae)
        return range(cuts[self.rank], cuts[self.rank + 1])

    def latent_blocks(self, d_sae: int) -> list[range]:
        """The blocks of latents that this rank holds, one without fixed blocks."""
        if self.blocks == 1:
            return [self.latents(d_sae)]
        cuts, held = latent_cuts(d_sae, self.blocks, self._latents_per_unit), self.blocks // self.size
        first = self.rank * held
        return [range(cuts[block], cuts[block + 1]) for block in range(first, first + held)]

    # Collectives

    def sum(self, tensor: Tensor, purpose: str) -> Tensor:
        """The sum of `tensor` over all ranks, in place; all ranks get the same bits, in an order of the backend."""
        if not self.is_alone:
            with self.counted(purpose, 2 * (self.size - 1) * tensor.nbytes // self.size):
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, piece: Tensor, purpose: str) -> Tensor:
        """The pieces of all ranks, [P, *piece.shape]; they have one shape."""
        if self.is_alone:
            return piece[None]
        pieces = piece.new_empty(self.size, *piece.shape)
        with self.counted(purpose, (self.size - 1) * piece.nbytes):
            _all_gather(_bytes(pieces), _bytes(piece.contiguous()), group=self._group)
        return pieces

    def exchange(self, pieces: Tensor, purpose: str) -> Tensor:
        """Sends pieces[r] to rank r; returns the piece from every rank, [P, …] like `pieces`."""
        if self.is_alone:
            return pieces
        received = torch.empty_like(pieces)
        with self.counted(purpose, (self.size - 1) * pieces.nbytes // self.size):
            dist.all_to_all_single(_bytes(received), _bytes(pieces.contiguous()), group=self._group)
        return received

    def broadcast(self, tensor: Tensor, purpose: str) -> Tensor:
        """Gives all ranks rank 0's `tensor`, in place."""
        if not self.is_alone:
            with self.counted(purpose, tensor.nbytes if self.rank else 0):
                dist.broadcast(tensor, group_src=0, group=self._group)
        return tensor

    def sum_in_order(self, parts: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """Sum over the parts of all ranks, added one by one from the first part of rank 0 to the last of the last.

        `parts` is [parts of this rank, rows, …]; the ranks have equally many. The result [rows, …] has the same bits
        for every number of ranks that divides the number of all parts. Each rank adds up its share of the rows. With
        `dtype` each part is rounded to it once, and so is the result; sums are formed in the type of `parts`.
        """
        exact, parts = parts.dtype, parts if dtype is None else parts.to(dtype)
        if self.is_alone:
            return _added(parts, exact).to(parts.dtype).to(exact)
        count, rows = parts.shape[:2]
        share = -(-rows // self.size)
        padded = torch.nn.functional.pad(parts, [0, 0] * (parts.dim() - 2) + [0, share * self.size - rows])
        by_rank = padded.view(count, self.size, share, *parts.shape[2:]).transpose(0, 1)
        received = self.exchange(by_rank.contiguous(), purpose)
        own = _added(received.flatten(0, 1), exact).to(parts.dtype)
        return self.gather(own, purpose).flatten(0, 1)[:rows].to(exact)

    def total(self, parts: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """Sum over the blocks of latents of all ranks: parts [blocks of this rank, rows, …] → [rows, …].

        `dtype` is that of the numbers that cross ranks, None for that of `parts`: see `sum_in_order`.
        """
        if self.blocks == 1 and (dtype is None or self.is_alone):
            return self.sum(parts[0], purpose)
        return self.sum_in_order(parts, purpose, dtype)

    def count(self, number: int, purpose: str = "scalars") -> int:
        """The sum of a number over all ranks."""
        return number if self.is_alone else int(self.sum(self._scalar(number), purpose))

    def counts(self, number: int, purpose: str = "scalars") -> list[int]:
        """The numbers of all ranks."""
        return [number] if self.is_alone else self.gather(self._scalar(number), purpose).tolist()

    def gather_rows(self, rows: Tensor, purpose: str) -> Tensor:
        """The rows of all ranks one after another; each rank may have another number of them."""
        if self.is_alone:
            return rows
        counts = self.counts(len(rows), purpose)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        pieces = self.gather(padded, purpose)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks, each cut off after ANSWER_BYTES. For ranks whose tensors are on the host."""
        own = torch.zeros(ANSWER_BYTES, dtype=torch.uint8)
        encoded = torch.frombuffer(bytearray(text.encode()[:ANSWER_BYTES] or b"\0"), dtype=torch.uint8)
        own[: len(encoded)] = encoded
        texts = self.gather(own, "texts")
        return [one.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for one in texts]

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Raises OSError on every rank when the block raises it on one, so that all give up together.

        Collective, of ranks whose tensors are on the host; the block must not be.
        """
        fault = ""
        try:
            yield
        except OSError as error:
            if self.is_alone:
                raise
            fault = str(error) or type(error).__name__
        if not self.is_alone and any(faults := self.gather_texts(fault)):
            raise OSError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(faults) if text))

    def _scalar(self, number: int) -> Tensor:
        return torch.tensor(number, device=self.device)

    @contextmanager
    def counted(self, purpose: str, received_bytes: int) -> Iterator[None]:
        """Counts what is received in the block, and its time."""
        begin = time.perf_counter()
        with _peers():
            yield
        self.traffic.seconds[purpose] += time.perf_counter() - begin
        self.traffic.received_bytes[purpose] += received_bytes


class OtherRanks(Ranks):
    """The ranks of another placement group: this process holds none of their latents, and no collective is theirs."""

    def __init__(self, group_index: int, size: int, blocks: int, latents_per_unit: int = LATENTS_PER_UNIT) -> None:
        super().__init__(0, size, None, blocks, latents_per_unit, group_index=group_index)

    def latents(self, d_sae: int) -> range:
        return range(0)

    def latent_blocks(self, d_sae: int) -> list[range]:
        return [range(0)]


ALONE = Ranks(0, 1, None)
"""A process that trains by itself."""


def _bytes(tensor: Tensor) -> Tensor:
    """What is moved and not added up: backends lack some types of numbers.

    A contiguous tensor of one element may have any stride, which `view` takes no other type with.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts[0] + parts[1] + …, in this order and this type, in a tensor of its own."""
    total = parts[0].to(dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total


def latent_cuts(d_sae: int, parts: int, unit: int = LATENTS_PER_UNIT) -> list[int]:
    """Where latents are cut into `parts` ranges, at multiples of `unit`: [parts + 1] from 0 to d_sae.

    When `parts` divides a larger number of parts, its cuts are among the cuts of that number.
    """
    units = -(-d_sae // unit)
    return [min(d_sae, unit * (units * part // parts)) for part in range(parts + 1)]


class RankLostError(Exception):
    """Another rank has ended, or does not answer any more: this one cannot go on by itself."""


CONTROL_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others. Rank 0 sends something every few seconds, also while it waits itself."""
SHORT_MESSAGE_BYTES = 1016


class World:
    """All ranks that torchrun has started, and what they say to each other on the host: texts, never pickled objects.

    Waiting happens here, over gloo: a rank that dies closes its connections, which the others notice at once.
    """

    def __init__(self, timeout: timedelta = CONTROL_TIMEOUT) -> None:
        """Meets the other ranks at the address in torchrun's environment variables."""
        self._timeout = timeout
        dist.init_process_group("gloo", timeout=timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        with _peers():
            dist.barrier()  # gloo connects at the first collective, which can hang when a rank dies before it
        self._host = Ranks(self.rank, self.size, None)
        self._between_devices: dist.ProcessGroup | None = None

    def placement_group(
        self, device: torch.device, groups: int, blocks: int, exchange: ExchangeFormat
    ) -> tuple[Ranks, Ranks]:
        """Forms `groups` of ranks; returns this rank's, for tensors on `device` and for tensors on the host.

        To be called by all ranks.
        """
        is_gpu, size = device.type == "cuda", self.size // groups
        if is_gpu:
            torch.cuda.set_device(device)
        own, host = ALONE, ALONE
        for index in range(groups):
            members = list(range(index * size, (index + 1) * size))
            group = dist.new_group(members, backend="nccl" if is_gpu else "gloo", timeout=self._timeout)
            on_host = dist.new_group(members, backend="gloo", timeout=self._timeout)
            if self.rank in members:
                rank = self.rank - members[0]
                own = Ranks(rank, size, group, blocks, device=device, exchange=exchange, group_index=index)
                host = Ranks(rank, size, on_host, blocks, group_index=index)
        if is_gpu and groups > 1:
            self._between_devices = dist.new_group(backend="nccl", timeout=self._timeout)
        own.sum(torch.zeros(1, device=device), "start")
        host.sum(torch.zeros(1), "start")
        return own, host

    def send_tensor(self, tensor: Tensor, rank: int) -> None:
        """Sends a tensor on this rank's device to another rank."""
        with _peers():
            dist.send(tensor.view(-1), rank, group=self._between_devices)

    def receive_tensor(self, tensor: Tensor) -> None:
        """Receives a tensor from rank 0, in place."""
        with _peers():
            dist.recv(tensor.view(-1), 0, group=self._between_devices)

    def send(self, message: bytes) -> None:
        """Sends a message from rank 0 to all others."""
        short = torch.zeros(8 + SHORT_MESSAGE_BYTES, dtype=torch.uint8)
        short[:8].view(torch.int64)[0] = len(message)
        data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        first = data[:SHORT_MESSAGE_BYTES]
        short[8 : 8 + len(first)] = first
        with _peers():
            dist.broadcast(short, 0)
            if len(message) > SHORT_MESSAGE_BYTES:
                dist.broadcast(data, 0)

    def receive(self) -> bytes:
        """Waits for the next message from rank 0."""
        short = torch.zeros(8 + SHORT_MESSAGE_BYTES, dtype=torch.uint8)
        with _peers():
            dist.broadcast(short, 0)
            length = int(short[:8].view(torch.int64))
            if length <= SHORT_MESSAGE_BYTES:
                return short[8 : 8 + length].numpy().tobytes()
            data = torch.zeros(length, dtype=torch.uint8)
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks, of any length."""
        own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        lengths = self._host.counts(len(own), "texts")
        texts = self._host.gather_rows(own, "texts").numpy().tobytes()
        ends = list(accumulate(lengths, initial=0))
        return [texts[first:end].decode().strip() for first, end in pairwise(ends)]

    def close(self) -> None:
        """Leaves the groups, at an end that all ranks know of."""
        dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    """Turns the errors of a backend, whose type is RuntimeError, into RankLostError."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"another rank has ended or does not answer: {str(error).splitlines()[0]}") from error
