"""Training with this library beside Pyro's own way of writing a VAE and beside ``pythae``, on the same
networks.

Nothing of this library stands in what is measured of the others but the networks, which are handed to them.
"""

import contextlib
import importlib
import io
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pvae.data import Data, MissingData, Split, load
from pvae.guides import NormalGuide
from pvae.inference import ELBO
from pvae.inference.isolation import evaluating
from pvae.inference.trainer import Trainer
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal

from ..program import Program
from .timing import Row, clock_of, left_out, row
from .training import placed

__all__ = ["CASES", "Peer", "PeerCase", "held_out_elbo", "peers_of", "time_peers", "time_to"]

_LR = 1e-3
_VALIDATION_BATCH, _VALIDATION_SEED = 1000, 20_140_501
_NOT_INSTALLED = "pythae is not installed: pip install 'pyro-pvae[bench]'"


@dataclass(frozen=True)
class PeerCase:
    """What everybody trains.

    Attributes:
        hidden: Widths of the encoder's hidden layers, the decoder's in reverse.
        z_dim: Size of z.
        batch_size: Data per step.
        epochs: The epoch whose held-out ELBO, reached by this library, is the one to reach.
        most: Epochs after which whoever has not reached it is given up.
    """

    hidden: tuple[int, ...]
    z_dim: int
    batch_size: int
    epochs: int
    most: int

    def program(self, x_shape: Sequence[int]) -> Program:
        """Build model and guide."""
        encoder = MLPEncoder(x_shape, self.z_dim, self.hidden)
        decoder = MLPDecoder(self.z_dim, x_shape, self.hidden[::-1])
        return Program(VAE(StandardNormal(self.z_dim), decoder, Bernoulli()), NormalGuide(encoder))


#: By data set: MNIST where its files are, else the digits that ship with scikit-learn.
CASES: dict[str, PeerCase] = {
    "mnist": PeerCase((400, 400), z_dim=20, batch_size=128, epochs=3, most=8),
    "digits": PeerCase((64,), z_dim=8, batch_size=64, epochs=20, most=60),
}


class Peer(Protocol):
    """A way to train an encoder and a decoder.

    Attributes:
        networks: Both, as they are trained.
        steps: Steps of an epoch.
    """

    networks: nn.ModuleList
    steps: int

    def begin(self, start: dict[str, Tensor], seed: int) -> None:
        """Start afresh from given weights."""
        ...

    def epoch(self, number: int) -> None:
        """Train for one epoch, counted from 0."""
        ...


class _Ours:
    """What :func:`pvae.fit` does within an epoch."""

    def __init__(self, program: Program, train: Split, engine: str, batch_size: int) -> None:
        self.networks = _networks(program)
        self.steps = len(train) // batch_size
        self._train, self._batch_size, self._seed = train, batch_size, 0
        self._trainer = Trainer(*program, total_steps=10**9, lr=_LR, engine=engine, window=self.steps)
        tensors, self._meta = self._trainer.state()
        self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        # One step that is taken back: compilation is not training.
        with self._trainer.generator():
            self._trainer.step(next(self._batches(0)))
        self._trainer.read_losses()
        self._meta["names"] = list(self._trainer.engine.names)

    def begin(self, start: dict[str, Tensor], seed: int) -> None:
        self._trainer.restore({name: tensor.clone() for name, tensor in self._tensors.items()}, self._meta)
        self.networks.load_state_dict(start)
        self._seed = seed

    def epoch(self, number: int) -> None:
        with self._trainer.generator():
            for batch in self._batches(number):
                self._trainer.step(batch)
        self._trainer.read_losses()

    def _batches(self, number: int) -> Iterator[Any]:
        return self._trainer.batches(self._train, self._batch_size, seed=self._seed, epoch=number)


class _Pyro:
    """Pyro as its introduction to VAEs writes one: modules registered inside model and guide, a plate over
    the batch, ``SVI`` with ``Trace_ELBO`` and ``pyro.optim.Adam``, batches from a loader, the loss read at
    each step.

    Pyro's validation is on, as it is by default, but for the density of the pixels.
    """

    def __init__(self, program: Program, train: Split, batch_size: int) -> None:
        self.networks = _networks(program)
        self._loader = DataLoader(TensorDataset(train.x), batch_size, shuffle=True, drop_last=True)
        self.steps = len(self._loader)

    def begin(self, start: dict[str, Tensor], seed: int) -> None:
        torch.manual_seed(seed)
        self.networks.load_state_dict(start)
        with pyro.get_param_store().scope() as self._store:
            pass
        self._svi = SVI(self._model, self._guide, pyro.optim.Adam({"lr": _LR}), loss=Trace_ELBO())

    def epoch(self, number: int) -> None:
        total = 0.0
        with pyro.get_param_store().scope(self._store), pyro.validation_enabled(True):
            for (x,) in self._loader:
                total += self._svi.step(x)

    def _model(self, x: Tensor) -> None:
        decoder: Any = self.networks[1]
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(len(x), decoder.z_dim)
            z = pyro.sample("latent", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            probs = decoder(z).sigmoid().flatten(1)
            pixels = dist.Bernoulli(probs, validate_args=False).to_event(1)
            pyro.sample("obs", pixels, obs=x.flatten(1))

    def _guide(self, x: Tensor) -> None:
        encoder = self.networks[0]
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


class _Pythae:
    """The loop of ``pythae``'s trainer over an epoch, as it ships, on its own ``VAE`` with given networks.

    Its loss is the single-sample ELBO with the closed-form KL; "bce" on bits is the Bernoulli likelihood.
    What its ``train`` does between epochs (a copy of the best model, its messages) is not called.

    Raises:
        ImportError: If it is not installed.
    """

    def __init__(self, program: Program, train: Split, batch_size: int, folder: str) -> None:
        models, trainers = (importlib.import_module(f"pythae.{name}") for name in ("models", "trainers"))
        datasets = importlib.import_module("pythae.data.datasets")
        self.networks = _networks(program)
        self._trainers, self._folder, self._batch_size = trainers, folder, batch_size
        labels = torch.zeros(len(train)) if train.y is None else train.y
        self._data = datasets.BaseDataset(train.x, labels)
        self.steps = -(-len(train) // batch_size)
        encoder, decoder = _adapted(*self.networks)
        config = models.VAEConfig(
            input_dim=tuple(train.x_shape), latent_dim=encoder.latent_dim, reconstruction_loss="bce"
        )
        self._vae = models.VAE(config, encoder=encoder, decoder=decoder)

    def begin(self, start: dict[str, Tensor], seed: int) -> None:
        self.networks.load_state_dict(start)
        device = next(self.networks.parameters()).device
        with _silent():
            config = self._trainers.BaseTrainerConfig(
                output_dir=self._folder,
                learning_rate=_LR,
                per_device_train_batch_size=self._batch_size,
                seed=seed,
                no_cuda=device.type == "cpu",
            )
            self._trainer = self._trainers.BaseTrainer(self._vae, self._data, training_config=config)
            self._trainer.prepare_training()

    def epoch(self, number: int) -> None:
        with _silent():
            self._trainer.train_step(number + 1)


def time_peers(device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time steps, and the way to one held-out ELBO, of this library and of others.

    Everybody starts from the same weights and trains on the same bits (binarised once), in batches of one
    size, with Adam at one rate, in turns of one epoch. After each epoch the weights are copied into one pair
    of programs and the ELBO of the validation data is estimated there, with the same draws, outside of the
    clock. The one to reach is what the first engine has after ``PeerCase.epochs``; between epochs it is
    interpolated. The test data are not touched.

    Args:
        device: Where to run.
        rounds: Rounds, each with another order of the data.
        engines: Engines of ours to time.

    Returns:
        Two rows for each engine and peer, with notes in words.
    """
    name, data = _data()
    case = CASES[name]
    train, valid = data.train.to(device), data.valid.to(device)
    judge = placed(case.program(data.x_shape), device)
    start = {key: value.clone() for key, value in _networks(judge).state_dict().items()}
    clock = clock_of(device)
    with tempfile.TemporaryDirectory() as folder:
        peers = peers_of(case, train, engines, device, folder)
        results = [_round(case, peers, judge, valid, start, seed, clock) for seed in range(rounds)]
    return _rows(name, case, peers, results, engines)


def peers_of(
    case: PeerCase, train: Split, engines: tuple[str, ...], device: torch.device, folder: str
) -> dict[str, Peer]:
    """Everybody who is there, by name, this library's engines first.

    Args:
        case: What to train.
        train: The training data.
        engines: Engines of ours.
        device: Where to train.
        folder: Where a peer may write.
    """

    def program() -> Program:
        return placed(case.program(train.x_shape), device)

    found: dict[str, Peer] = {engine: _Ours(program(), train, engine, case.batch_size) for engine in engines}
    found["Pyro"] = _Pyro(program(), train, case.batch_size)
    with contextlib.suppress(ImportError):
        found["pythae"] = _Pythae(program(), train, case.batch_size, folder)
    return found


@torch.no_grad()
def held_out_elbo(program: Program, split: Split) -> float:
    """Estimate the mean single-sample ELBO of a split in nats, with the same draws at every call."""
    total = 0.0
    with evaluating(*program):
        torch.manual_seed(_VALIDATION_SEED)
        for batch in split.batches(_VALIDATION_BATCH, seed=0, epoch=0, drop_last=False, shuffle=False):
            total += float(ELBO().terms(*program, batch.x).bound.double().sum())
    return total / len(split)


def time_to(threshold: float, seconds: Sequence[float], elbos: Sequence[float]) -> float | None:
    """Return after how many seconds a curve first reaches a threshold; ``None`` if it does not.

    Args:
        threshold: An ELBO, nats.
        seconds: What each epoch took.
        elbos: The ELBO after each. The first epoch counts whole, later ones by interpolation.
    """
    spent = 0.0
    for epoch, (took, elbo) in enumerate(zip(seconds, elbos, strict=True)):
        if elbo >= threshold:
            share = (threshold - elbos[epoch - 1]) / (elbo - elbos[epoch - 1]) if epoch else 1.0
            return spent + share * took
        spent += took
    return None


@dataclass(frozen=True)
class _Result:
    """What one round found: seconds of each epoch and the ELBO after it, by peer, and the one to reach."""

    seconds: dict[str, list[float]]
    elbos: dict[str, list[float]]
    threshold: float


def _round(
    case: PeerCase,
    peers: dict[str, Peer],
    judge: Program,
    valid: Split,
    start: dict[str, Tensor],
    seed: int,
    clock: Callable[[], float],
) -> _Result:
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    elbos: dict[str, list[float]] = {name: [] for name in peers}
    threshold = float("inf")
    for peer in peers.values():
        peer.begin(start, seed)
    for epoch in range(case.most):
        for name in list(peers)[:: 1 if (seed + epoch) % 2 == 0 else -1]:
            if epoch >= case.epochs and max(elbos[name]) >= threshold:
                continue
            begun = clock()
            peers[name].epoch(epoch)
            seconds[name].append(clock() - begun)
            _networks(judge).load_state_dict(peers[name].networks.state_dict())
            elbos[name].append(held_out_elbo(judge, valid))
        if epoch == case.epochs - 1:
            threshold = next(iter(elbos.values()))[-1]
    return _Result(seconds, elbos, threshold)


def _rows(
    name: str, case: PeerCase, peers: dict[str, Peer], results: list[_Result], engines: tuple[str, ...]
) -> list[Row]:
    size = f"{name}, batch {case.batch_size}"
    per_step = {
        peer: [sum(r.seconds[peer][: case.epochs]) / (case.epochs * found.steps) for r in results]
        for peer, found in peers.items()
    }
    way = {peer: [time_to(r.threshold, r.seconds[peer], r.elbos[peer]) for r in results] for peer in peers}
    nats = statistics.median(r.threshold for r in results)
    rows: list[Row] = []
    for ours in engines:
        for theirs in ("Pyro", "pythae"):
            step, reach = f"{ours}, step", f"{ours}, to an ELBO"
            if theirs not in peers:
                rows += [left_out("peers", what, theirs, _NOT_INSTALLED) for what in (step, reach)]
                continue
            rates = [1 / statistics.median(per_step[peer]) for peer in (ours, theirs)]
            note = f"{size}: {rates[0]:.0f} and {rates[1]:.0f} steps a second"
            rows.append(_named(per_step, ours, theirs, step) | {"size": size, "note": note})
            arrived = {peer: [t for t in way[peer] if t is not None] for peer in (ours, theirs)}
            late = [peer for peer, times in arrived.items() if len(times) < len(results)]
            if late:
                reason = f"{' and '.join(late)} did not reach {nats:.2f} nats in {case.most} epochs"
                rows.append(left_out("peers", reach, theirs, f"{size}: {reason}"))
                continue
            note = f"{size}: held-out ELBO {nats:.2f} nats, that of {engines[0]} after {case.epochs} epochs"
            rows.append(_named(arrived, ours, theirs, reach) | {"size": size, "note": note})
    return rows


def _named(seconds: dict[str, list[float]], ours: str, theirs: str, what: str) -> Row:
    return row("peers", ours, theirs, seconds, 1, None, None) | {"ours": what}


def _data() -> tuple[str, Data]:
    """The first data set that is there, binarised once."""
    try:
        return "mnist", load("mnist", binarize="static")
    except MissingData:
        return "digits", load("digits", binarize="static")


def _networks(program: Program) -> nn.ModuleList:
    """Encoder and decoder."""
    model, guide = program
    return nn.ModuleList([guide.encoder, model.decoder])  # type: ignore[list-item]


def _adapted(encoder: Any, decoder: Any) -> tuple[Any, Any]:
    """Hand an encoder and a decoder of ours to ``pythae``, by the classes that it wants them in."""
    networks = importlib.import_module("pythae.models.nn")
    output = importlib.import_module("pythae.models.base.base_utils").ModelOutput

    class AdaptedEncoder(networks.BaseEncoder):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = encoder
            self.latent_dim = encoder.z_dim

        def forward(self, x: Tensor) -> Any:
            loc, scale = self.network(x)
            return output(embedding=loc, log_covariance=2 * scale.log())

    class AdaptedDecoder(networks.BaseDecoder):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = decoder

        def forward(self, z: Tensor) -> Any:
            return output(reconstruction=self.network(z).sigmoid())

    return AdaptedEncoder(), AdaptedDecoder()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep a library's messages and progress bars off the terminal; they are made all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
