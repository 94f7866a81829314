"""Several processes as one run: data parallelism, on torch.distributed as `torchrun` starts it. `policy.Policy` holds the ranks.

    torchrun --nproc-per-node 2 siri.py --env alfworld

Every rank goes through the whole method. Groups are independent until the update, so what takes time is dealt: the groups of a
rollout, the prompts of a mining, the rows of an optimizer step. What was played is told to all, and gradients are summed; all else
(advantages, effects, bank, progress, when to stop) follows from the same numbers on every rank, and needs no exchange. So the
number of ranks is seen in nothing but rounding and time. Rank 0 alone prints, writes, saves and holds the lock (`run.py`).

What differs from the usual script, and why:
- No wrapper around the model: gradients are added after the last micro-batch of a step, once. How many micro-batches a rank has,
  and whether it has any row at all, is its own affair.
- Ranks talk in JSON, not in pickles: what comes over a network can say something false, but runs nothing.
- A rank that dies or hangs would leave the others waiting for good. Each says every second that it lives; one that is silent
  ends the run, with a line that names it.

Without torchrun there is one rank, `Ranks()`, and torch.distributed is never imported.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from tools.terminal import say

PATIENCE = 20               # seconds of work without a sign of life after which a rank is given up; torchrun takes 30 more
SLOW = 600                  # the same for a large model on a CPU, where one batch may take minutes
BROKEN = 4                  # the same once an exchange has broken: somebody is gone
MEETING = 300               # seconds in which all ranks have to come
BUCKET = 2**24              # numbers that are added at once, 64 MiB in fp32
Item = TypeVar("Item")


class Ranks:
    """One process by itself: all is dealt to it, and there is nobody to tell."""
    rank, size = 0, 1
    sharing = 1             # ranks that use the same device
    after = ""              # how to go on with the run once it has ended, for the line that says why it did
    patience = PATIENCE

    def deal(self, costs: Sequence[float]) -> list[list[int]]:
        """The places of these costs, for each rank, in their order: the dearest first, each to the rank that has least so far.
        What is left over goes to the early ranks.

        >>> ranks = Ranks()
        >>> ranks.size = 2
        >>> ranks.deal([1, 1, 1]), ranks.deal([5, 9, 3, 1])
        ([[0, 2], [1]], [[1], [0, 2, 3]])
        """
        dealt, loads = [list[int]() for _ in range(self.size)], [0.0] * self.size
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            least = loads.index(min(loads))
            dealt[least].append(i)
            loads[least] += costs[i]
        return [sorted(own) for own in dealt]

    def share(self, items: Sequence[Item], cost: Callable[[Item], float]) -> list[Item]:
        """Those of the items that are dealt to this rank."""
        return [items[i] for i in self.deal([cost(item) for item in items])[self.rank]]

    def gather(self, data: Any) -> list[Any]:
        """What each rank says at this place, in their order: JSON."""
        return [data]

    def others(self, data: Callable[[], Any]) -> list[Any]:
        """What the other ranks say at this place, in their order."""
        return [said for rank, said in enumerate(self.gather(data())) if rank != self.rank] if self.size > 1 else []

    def first(self, work: Callable[[], Any]) -> Any:
        """What rank 0 finds out, on every rank: JSON."""
        return self.gather(work() if self.rank == 0 else None)[0]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place: the same bits on every rank."""

    def working(self) -> contextlib.AbstractContextManager[None]:
        """While a rank works, it says now and then that it is alive; while it loads, writes or waits, nobody expects it."""
        return contextlib.nullcontext()

    def alive(self) -> None:
        """A sign of life: this rank has got on with its work."""

    def report(self) -> str:
        """What the exchange took so far; empty where there was none."""
        return ""

    def end(self, cause: str, speak: Callable[[], Any]) -> None:
        """This rank ends, for a cause, or because all is done; `speak` says so, on rank 0."""
        speak()


class Torchrun(Ranks):
    """The ranks of a run that torchrun has started; this process is one of them. On CUDA gradients go by NCCL where every rank has
    a card of its own, all else and elsewhere by gloo. `gather`, what is made of it, `add`, and `end` without a cause are
    collective: every rank must come to them. RuntimeError where the ranks can't find each other."""

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous
        here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        self.dist, self.sharing, self.over = dist, -(-here // max(cards, 1)), threading.Event()
        self.lives, self.busy, self.broken, self.sent, self.waited = 0, False, False, 0, 0.0       # bytes, seconds
        store, self.rank, self.size = next(rendezvous("env://"))
        if cards:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % cards)
        me = dict(name=f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})",
                  nccl=cards >= here and dist.is_nccl_available())
        store = store.clone()                           # `watch` has a connection of its own
        self.store = dist.PrefixStore(meet(store, self.rank, self.size), store)
        self.store.set_timeout(datetime.timedelta(seconds=PATIENCE))
        self.store.set(f"who {self.rank}", json.dumps(me))
        self.store.set(f"life {self.rank}", "0")
        all_of_us = [json.loads(self.store.get(f"who {rank}")) for rank in range(self.size)]
        self.names, self.nccl = [one["name"] for one in all_of_us], all(one["nccl"] for one in all_of_us)
        self.store.wait([f"life {rank}" for rank in range(self.size)])
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        # A rollout may take hours, and who has played waits for the others: what ends a wait is `watch`.
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.nccl else "gloo", store=dist.PrefixStore("work", self.store.clone()),
                                rank=self.rank, world_size=self.size, timeout=datetime.timedelta(days=7))
        self.gather(None)
        if self.nccl:
            self.add([torch.zeros(1, device="cuda")])           # its buffers are there before memory is measured

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self.alive()
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def alive(self) -> None:
        self.lives += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """An exchange with the others. If it breaks, somebody is gone: `watch` finds out who, and ends the process."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as e:
            if not isinstance(e, torch.OutOfMemoryError):
                self.broken = True
                time.sleep(2 * PATIENCE)
            raise
        self.waited += time.perf_counter() - started

    def gather(self, data: Any) -> list[Any]:
        text = json.dumps(data, default=lambda number: number.item())              # environments of others pay in numpy's numbers
        said = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.waiting():
            self.dist.all_gather(sizes, torch.tensor([len(said)]))
            longest = max(map(int, sizes))
            heard = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            self.dist.all_gather(heard, torch.nn.functional.pad(said, (0, longest - len(said))))
        self.sent += longest
        return [json.loads(part[:int(n)].numpy().tobytes()) for part, n in zip(heard, sizes)]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        start = 0
        while start < len(tensors):
            stop, total = start + 1, tensors[start].numel()
            while stop < len(tensors) and total + tensors[stop].numel() <= BUCKET:
                total, stop = total + tensors[stop].numel(), stop + 1
            part = tensors[start:stop]
            flat = torch.cat([tensor.flatten() for tensor in part])
            flat = flat if self.nccl else flat.cpu()
            with self.waiting():
                self.dist.all_reduce(flat)
                if flat.is_cuda:
                    torch.cuda.synchronize()            # NCCL returns before it has begun
            for tensor, summed in zip(part, flat.split([tensor.numel() for tensor in part])):
                tensor.copy_(summed.view_as(tensor))
            self.sent, start = self.sent + flat.nbytes, stop

    def report(self) -> str:
        return f"each rank told the others {self.sent / 2**20:.0f} MiB; this one waited {self.waited:.0f} s, in all"

    def watch(self) -> None:
        """In a thread: say each second that this rank lives, and end the process once another has ended or is silent."""
        looked = time.monotonic()
        seen, since = [""] * self.size, [looked] * self.size
        while not self.over.wait(1):
            self.lives += not self.busy
            try:
                self.store.set(f"life {self.rank}", str(self.lives))
                said = [text.decode() for text in self.store.multi_get([f"life {rank}" for rank in range(self.size)])]
                cause = self.store.get("end").decode() if self.store.check(["end"]) else ""
            except RuntimeError:            # it went with its machine
                said, cause = seen, f"the store of torchrun, on {os.environ['MASTER_ADDR']}, cannot be reached"
            now = time.monotonic()
            paused, looked = now - looked > BROKEN, now         # this machine slept, and the others may have
            since = [now if a != b or paused else t for a, b, t in zip(said, seen, since)]
            seen, patience = said, BROKEN if self.broken else self.patience
            silent = [rank for rank in range(self.size) if now - since[rank] > patience]
            if cause or silent:
                cause = cause or (f"{self.names[silent[0]]} has given no sign of life for {patience} s: it is dead or hangs"
                                  + self.after)
                with contextlib.suppress(OSError, ValueError, RuntimeError):
                    if self.rank == min({*range(self.size)}.difference(silent), default=0):
                        say(f"siri: {' '.join(cause.split())}", sys.__stderr__)
                        self.store.set("said", "")
                    else:
                        self.store.wait(["said"])       # torchrun ends the others as soon as one has ended
                os._exit(2)

    def end(self, cause: str, speak: Callable[[], Any]) -> None:
        if not cause:
            self.gather(None)               # nobody is to miss the others
        self.over.set()
        self.thread.join()                  # unless it is just ending the process
        speak()
        if not cause:
            return self.dist.destroy_process_group()
        try:
            if self.rank == 0:
                self.store.set("said", "")
            self.store.set("end", f"{self.names[self.rank]}: {cause}")
            self.store.wait(["said"])
        except RuntimeError:                # rank 0 does not answer
            say(f"siri: {self.names[self.rank]}: {cause}", sys.__stderr__)


def meet(store: Any, rank: int, size: int) -> str:
    """A name for this meeting of ranks, the same on all of them. What was said in the store before a restart stays there, so a rank
    knows rank 0 by its answer to a greeting that nobody has used before. RuntimeError if somebody does not come."""
    own, started = uuid.uuid4().hex, time.monotonic()
    store.set(f"hello {rank}", own)
    while time.monotonic() - started < MEETING:
        if rank == 0:
            for other in range(1, size):
                if store.check([f"hello {other}"]):
                    store.set(f"{own} {other}", store.get(f"hello {other}"))
            absent = [other for other in range(1, size) if not store.check([f"{own} {other} is here"])]
            if not absent:
                return own
        else:
            first = store.get("hello 0").decode()
            if store.check([f"{first} {rank}"]) and store.get(f"{first} {rank}").decode() == own:
                store.set(f"{first} {rank} is here", "")
                return first
        time.sleep(0.1)
    raise RuntimeError(f"rank {absent[0] if rank == 0 else 0} did not come within {MEETING} s")


def join() -> Ranks:
    """The ranks that torchrun has started, with this process as one of them; without torchrun, this process alone."""
    return Torchrun() if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ} else Ranks()
