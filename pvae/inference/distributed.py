"""Several processes that train or evaluate one model together, as ``torchrun`` starts them."""

import atexit
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from pvae.data._seeds import derive_seed
from pvae.ops import batch_mean_gradients, sharing_batches

from .engine import Engine, Pair, make_engine
from .isolation import device_of, isolated_rng
from .objective import ELBO
from .program import parameters_of

__all__ = [
    "TIMEOUT",
    "AveragedEngine",
    "ParallelEngine",
    "PeerFailure",
    "Pulse",
    "Team",
    "launched",
    "reaching",
    "shared_engine",
]

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: longer than any of them works alone."""

# Seconds between two questions whether somebody was told to stop, and the most steps.
_BEAT = 0.5
_MOST_STEPS = 1000

# Seconds that a process waits at the end for one that may be gone.
_PARTING = 10.0

# Keys in the store: of the first failure, and of how many are done.
_FAILURE, _DONE = "pvae/failure", "pvae/done"

_T = TypeVar("_T")


class PeerFailure(RuntimeError):
    """Another process of the team failed or is gone; the message is its sentence, where it left one."""


def launched() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return dist.is_available() and dist.is_torchelastic_launched() and _number("WORLD_SIZE") > 1


@dataclass(frozen=True)
class Team:
    """The processes that share each batch; a process alone is a team of one, and sends no message.

    What they tell each other beside gradients goes as JSON and safetensors, over gloo, whatever the gradients
    go over: a process that waits for a word does not wait for its device, and nothing is unpickled. All
    processes of a team must call its methods in the same order, but for :meth:`seed` and :meth:`fail`.

    Attributes:
        rank: Number of this process; 0 leads: it alone writes, prints and measures.
        size: Number of processes.
        group: What tensors on the device of the programs are sent over; ``None`` for a process alone.
        control: What everything else is sent over.
        store: Where the first failure is kept, if the group was initialised here.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False)
    control: Any = field(default=None, repr=False)
    store: Any = field(default=None, repr=False)

    _found: ClassVar["Team | None"] = None

    @classmethod
    def find(cls, wanted: bool | None = None) -> "Team":
        """Return the team of this process.

        If a process group of several is initialised, it is that. Else, if ``torchrun`` started this process
        as one of several, a group is initialised, with gloo for tensors on the CPU and NCCL for those on a
        GPU, which ends with the process.

        Args:
            wanted: ``False`` for this process alone in any case, ``True`` for several or an error, ``None``
                for what there is.

        Raises:
            ValueError: If several are wanted, and this process is one alone.
        """
        if wanted is False:
            return cls()
        if dist.is_available() and dist.is_initialized():
            if Team._found is None or Team._found.group is not dist.group.WORLD:
                Team._found = cls._of_group()
        else:
            Team._found = cls._of_group(_join()) if launched() else cls()
        if wanted and Team._found.alone:
            raise ValueError(
                "distributed=True needs several processes: start them with torchrun --nproc-per-node N, or "
                "initialise torch.distributed"
            )
        return Team._found

    @classmethod
    def _of_group(cls, store: Any = None) -> "Team":
        if dist.get_world_size() == 1:
            return cls()
        world = dist.group.WORLD
        # A user's group may be of NCCL alone, which takes nothing that lies on the CPU.
        speaks = "gloo" in dist.get_backend_config()
        control = world if speaks else dist.new_group(backend="gloo", timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), world, control, store)

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.group is None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, prints and measures."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """Return the seed of this process's draws: the run's own for the first process, another for each."""
        return seed if self.leads else derive_seed("rank", seed, self.rank)

    def sharing(self) -> AbstractContextManager[None]:
        """Let what is made of whole batches be made of all processes' shares, inside a training step."""
        return nullcontext() if self.alone else sharing_batches(self.mean)

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor on the programs' device over the processes; graphs can hold this."""
        if self.alone:
            return tensor
        from torch.distributed import _functional_collectives as functional

        with reaching():
            total = functional.all_reduce(tensor, "sum", self.group)
            if isinstance(total, functional.AsyncCollectiveTensor):
                total = total.wait()
        return total / self.size

    def tell(self, record: _T) -> _T:
        """Return what the leader has, in JSON; the others' own does not matter."""
        if self.alone:
            return record
        told: _T = json.loads(self._spread(json.dumps(record).encode() if self.leads else b""))
        return told

    def all(self, record: _T) -> list[_T]:
        """Return what each process has, in JSON, in the order of their numbers."""
        if self.alone:
            return [record]
        return [json.loads(content) for content in self._gathered(json.dumps(record).encode())]

    def give(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the leader's tensors, on the CPU."""
        if self.alone:
            return dict(tensors)
        return load_tensors(self._spread(_packed(tensors) if self.leads else b""))

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return each process's tensors, on the CPU, in the order of their numbers."""
        if self.alone:
            return [dict(tensors)]
        return [load_tensors(content) for content in self._gathered(_packed(tensors))]

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """Return the items that are this process's: every so manieth."""
        return items[self.rank :: self.size]

    def collect(self, parts: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """Put together what the processes made of their items of :meth:`share`, in the order of all items."""
        if self.alone:
            return list(parts)
        found: dict[int, dict[int, Tensor]] = {}
        own = {f"{i} {j}": tensor for i, part in enumerate(parts) for j, tensor in enumerate(part)}
        for rank, tensors in enumerate(self.gather(own)):
            for key, tensor in tensors.items():
                i, j = map(int, key.split())
                found.setdefault(rank + i * self.size, {})[j] = tensor
        return [tuple(found[i][j] for j in sorted(found[i])) for i in sorted(found)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let what one process raises in the block end all of them. In it they must not send anything.

        Raises:
            PeerFailure: In the processes that raised nothing, with the sentence of one that did.
        """
        if self.alone:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except PeerFailure:
            raise
        except Exception as raised:  # whatever it is, the others must not wait for this process
            error = raised
        said = self.all(None if error is None else " ".join(str(error).split()) or type(error).__name__)
        if error is not None:
            raise error
        others = [sentence for sentence in said if sentence is not None]
        if others:
            raise PeerFailure(others[0])

    def in_turn(self, make: Callable[[], _T]) -> _T:
        """Let the leader make something, then the others, who find what it left on the disk."""
        with self.together():
            if self.leads:
                made = make()
        return made if self.leads else make()

    def check_same(self, **settings: Any) -> None:
        """Refuse to train processes together that were told different things.

        Raises:
            ValueError: If a setting is not the same in all of them.
        """
        of_all = self.all(settings)
        for name in settings:
            values = [record[name] for record in of_all]
            if any(value != values[0] for value in values):
                shown = ", ".join(dict.fromkeys(map(str, values)))
                raise ValueError(f"{name} must be the same in all {self.size} processes, got {shown}")

    def check_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Refuse to go on with processes whose parameters have come apart.

        Raises:
            RuntimeError: If so: an optimiser or a program draws, counts or reads something in one of them
                that it does not in the others.
        """
        if self.alone:
            return
        sums = [p.detach().flatten().view(torch.uint8).sum(dtype=torch.int64) for p in parameters]
        if len({tuple(found) for found in self.all(torch.stack(sums).tolist())}) > 1:
            raise RuntimeError(
                "parameters must be the same in all processes after a step, but they differ: the optimizer "
                "does something else in one of them than in another"
            )

    def check_devices(self, device: torch.device) -> None:
        """Refuse GPUs that several processes would share, which NCCL cannot do.

        Raises:
            ValueError: If two processes lie on one GPU, or some on a GPU and some not.
        """
        places = self.all([socket.gethostname(), str(device)])
        if len({name.partition(":")[0] for _, name in places}) > 1:
            raise ValueError(f"all processes must train on one kind of device, got {_listed(places)}")
        if device.type != "cpu" and len({tuple(place) for place in places}) < len(places):
            raise ValueError(
                f"each process must train on a device of its own, got {_listed(places)}: take "
                "device='cuda', which is the one of the process's number on its machine"
            )

    def place(self, device: str | torch.device) -> torch.device:
        """Return a device, ``"cuda"`` being that of this process's number on its machine."""
        place = torch.device(device)
        if self.alone or place.type != "cuda" or place.index is not None:
            return place
        index, there = _number("LOCAL_RANK", self.rank), torch.cuda.device_count()
        if index >= there:
            raise ValueError(f"each process must have a GPU of its own, but process {index} found {there}")
        return torch.device("cuda", index)

    def fail(self, code: int) -> tuple[int, bool]:
        """Say that this process ends with an error.

        Args:
            code: Its exit code.

        Returns:
            The exit code of the process that failed first, and whether it was this one: the one that says
            what happened.
        """
        ours = f"{self.rank}:{code}"
        if self.store is None:
            return code, True
        try:
            first = self.store.compare_set(_FAILURE, "", ours).decode()
        except RuntimeError:  # torchrun itself is gone
            return code, True
        return int(first.partition(":")[2]), first == ours

    def part(self) -> None:
        """Wait until all are done: a process that leaves closes its connections to the others."""
        if self.alone:
            return
        self.all(None)
        if self.store is not None:
            self.store.add(_DONE, 1)
            end = time.monotonic() + _PARTING
            while time.monotonic() < end and self.store.add(_DONE, 0) < self.size:
                time.sleep(0.01)

    def _spread(self, content: bytes) -> bytes:
        """Send the leader's bytes to all."""
        with reaching():
            size = torch.tensor([len(content)])
            dist.broadcast(size, 0, group=self.control)
            sent = _tensor(content) if self.leads else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(sent, 0, group=self.control)
        return bytes(sent.numpy())

    def _gathered(self, content: bytes) -> list[bytes]:
        """Send each process's bytes to all."""
        with reaching():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(content)]), group=self.control)
            most = max(int(size) for size in sizes)
            found = [torch.empty(most, dtype=torch.uint8) for _ in sizes]
            dist.all_gather(found, _tensor(content.ljust(most, b"\0")), group=self.control)
        return [bytes(part[: int(size)].numpy()) for part, size in zip(found, sizes, strict=True)]


class Pulse:
    """Lets all processes hear that one of them was told to stop, after the same step of each.

    To ask costs a message, so it is done about twice a second; how many steps that is, the leader says.

    Args:
        team: The processes.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._stopping = False
        self._taken, self._until = 0, 1
        self._began = time.monotonic()

    def heard(self, asked: bool, now: bool = False) -> bool:
        """Whether to stop, the same answer in all processes; call it after each step.

        Args:
            asked: Whether this process was told to.
            now: Whether to ask the others in any case; all do then.
        """
        if self._team.alone:
            return asked
        self._taken += not now
        if self._stopping or not (now or self._taken >= self._until):
            return self._stopping
        passed = max(time.monotonic() - self._began, 1e-6)
        wanted = max(1, min(_MOST_STEPS, int(_BEAT * max(self._taken, 1) / passed)))
        answers = self._team.all([int(asked), wanted])
        self._stopping = any(told for told, _ in answers)
        self._taken, self._until = 0, answers[0][1]
        self._began = time.monotonic()
        return self._stopping


class ParallelEngine:
    """Runs the programs at every step under ``DistributedDataParallel``, on this process's share of a batch.

    Losses are means over data and shares are equal, so the averages of the gradients are those of the whole
    batch. Gradients are sent while others are still computed. Buffers are not sent: some belong to the share.

    Args:
        pair: Model, guide and objective as one module.
        team: The processes.
    """

    def __init__(self, pair: Pair, team: Team) -> None:
        self.names: tuple[str, ...] = ()
        self._pair, self._team = pair, team
        self._parameters = list(pair.parameters())
        self._parallel: nn.Module | None = None

    def __call__(self, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        """Leave gradients in the parameters; return the loss of this share and its parts."""
        if self._parallel is None:
            self._parallel = self._settled(args, beta)
        vector = self._descend(self._parallel, args, beta)
        self.names = self._pair.names
        return vector

    def _descend(self, parallel: nn.Module, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        with reaching():
            vector: Tensor = parallel(args, beta)
            vector[0].backward()
        return vector.detach()

    def _settled(self, args: tuple[Tensor, ...], beta: Tensor) -> nn.Module:
        """Wrap the programs, and take two passes whose gradients nobody uses and that leave no trace.

        The first finds whether a parameter has no gradient, which has to be said beforehand. In the second
        the order is found in which gradients are sent, and so added up: a run that is resumed then adds them
        as one that went on.
        """
        pair = self._pair
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        buffers = [(buffer, buffer.clone()) for buffer in pair.buffers()]
        with isolated_rng(device_of(pair)):
            gradients = torch.autograd.grad(pair(args, beta)[0], trained, allow_unused=True)
            unused = any(gradient is None for gradient in gradients)
            names = [name for name, _ in pair.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pair, names)
            with reaching():
                parallel = DistributedDataParallel(
                    pair, process_group=self._team.group, find_unused_parameters=unused, init_sync=False
                )
            self._descend(parallel, args, beta)
        for buffer, value in buffers:
            buffer.copy_(value)
        return parallel


class AveragedEngine:
    """Averages over the team what an engine finds that has all gradients of a step at once.

    Args:
        engine: The engine, run on this process's share of a batch.
        parameters: What it has gradients of.
    """

    def __init__(self, engine: Engine, parameters: Sequence[Tensor]) -> None:
        self.names: tuple[str, ...] = ()
        self._engine, self._parameters = engine, parameters

    def __call__(self, args: tuple[Tensor, ...], beta: Tensor) -> Tensor:
        """Leave gradients in the parameters; return the loss of this share and its parts."""
        with reaching():
            vector = self._engine(args, beta)
        batch_mean_gradients(self._parameters)
        self.names = self._engine.names
        return vector


def shared_engine(
    name: str, objective: ELBO, model: nn.Module, guide: nn.Module, compile: bool, team: Team
) -> Engine:
    """Build an engine by name, for a process alone or for one of several.

    Of several, ``"auto"`` is ``"eager"``: gradients are then sent while others are still computed.

    Raises:
        ValueError: For an unknown name.
    """
    if team.alone or name not in ("eager", "auto"):
        engine = make_engine(name, objective, model, guide, compile)
        return engine if team.alone else AveragedEngine(engine, [p for _, p in parameters_of(model, guide)])
    return ParallelEngine(Pair(objective, model, guide), team)


@contextmanager
def reaching() -> Iterator[None]:
    """Turn the errors of connections that end into one that says so.

    Raises:
        PeerFailure: If one did.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo has no error of its own: its messages begin with the place in its source.
        if isinstance(error, PeerFailure) or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise
        raise PeerFailure(
            "another process of the run is gone: it was killed, or its machine is lost"
        ) from error


def _join() -> Any:
    """Initialise the group that ``torchrun`` describes in the environment; return its store."""
    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    atexit.register(_leave)
    return store


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _number(name: str, otherwise: int = 1) -> int:
    return int(os.environ.get(name, otherwise))


def _listed(places: Sequence[Sequence[str]]) -> str:
    return ", ".join(f"{device} of {host}" for host, device in places)
