"""The captured step against the eager one: the same run, from tensors that never move."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pvae.data import Data, from_datasets, from_tensors
from pvae.guides import NormalGuide
from pvae.inference import Run, Trainer, fit
from pvae.inference.cuda_graph import CAPTURES, CudaCapture, NotCapturable, WholeStep
from pvae.inference.engine import EagerEngine, GraphEngine
from pvae.inference.program import program_state
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal

from .capturing import RecordingCapture
from .profiled import profiled_programs
from .programs import LinearGuide, LinearModel
from .test_engine import diffusion_ladder
from .test_fit import interrupt_after

State = dict[str, Tensor]
CPU = torch.device("cpu")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a recording stand in for a CUDA graph."""
    monkeypatch.setitem(CAPTURES, "cpu", RecordingCapture)


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(5)
    grey = torch.randint(0, 256, (260, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return from_tensors(grey[:200], valid=grey[200:], name="grey", binarize="dynamic")


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = VAE(StandardNormal(3), MLPDecoder(3, (1, 8, 8), (16,)), Bernoulli())
    return model, NormalGuide(MLPEncoder((1, 8, 8), 3, (16,)))


def ladder_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return diffusion_ladder()


def train(data: Any, programs: Any = pair, **settings: Any) -> tuple[Run, State]:
    model, guide = programs()
    defaults: dict[str, Any] = {"epochs": 3, "batch_size": 20, "lr": 1e-2, "progress": False}
    run = fit(model, guide, data, **{**defaults, "compile": False, **settings})
    return run, {name: tensor.clone() for name, tensor in program_state(model, guide).items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SCHEDULED: dict[str, Any] = {"schedule": "cosine", "beta_warmup": 2, "grad_clip": 2.0, "log_every": 4}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_captured_run_is_the_eager_run(data: Data, optimizer: str) -> None:
    """Schedules, warm-up, clipping, noise of the data and of z: nothing of them is frozen, to the bit.

    (Adamax has a formula without its counter on the host for GPUs alone.)
    """
    run, wanted = train(data, optimizer=optimizer, **SCHEDULED)
    captured, state = train(data, optimizer=optimizer, engine="cuda_graph", **SCHEDULED)
    assert captured.notes == []
    assert captured.history == run.history
    assert len({row["lr"] for row in run.history}) == len(run.history) > 8
    assert same(state, wanted)
    capture = RecordingCapture.last
    assert capture.strict == [False, True, True]
    assert (capture.recordings, capture.replays) == (1, 27)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("programs", [ladder_pair, profiled_programs])
def test_other_programs_are_captured_too(data: Data, programs: Any) -> None:
    """A way down that is kept from guide to model; a diffusion's times; running statistics."""
    x = data.train.x[:60] if programs is ladder_pair else torch.randn(60, 5)
    _, wanted = train(x, programs, epochs=3)
    run, state = train(x, programs, epochs=3, engine="cuda_graph")
    assert run.notes == []
    assert same(state, wanted)


@pytest.mark.usefixtures("on_cpu")
def test_a_captured_average_is_the_eager_one(data: Data) -> None:
    """The weight of an average enters as a tensor, and that formula rounds in another way."""
    run, wanted = train(data, ema=0.9, **SCHEDULED)
    captured, state = train(data, ema=0.9, engine="cuda_graph", **SCHEDULED)
    assert [row["loss"] for row in captured.history] == [row["loss"] for row in run.history]
    torch.testing.assert_close(state, wanted, rtol=1e-5, atol=1e-6)
    _, raw = train(data, **SCHEDULED)
    assert not torch.allclose(raw["model.decoder.mlp.out.weight"], wanted["model.decoder.mlp.out.weight"])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("cut", [2, 7, 10, 23])
def test_a_captured_run_is_resumed_to_the_same_bytes(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    options: dict[str, Any] = {"engine": "cuda_graph", "ema": 0.9, **SCHEDULED}
    whole, wanted = train(data, **options)
    interrupt_after(cut, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(data, out=tmp_path, **options)
    monkeypatch.undo()
    monkeypatch.setitem(CAPTURES, "cpu", RecordingCapture)
    resumed, state = train(data, out=tmp_path, resume=True, **options)
    assert same(state, wanted)
    assert resumed.history == whole.history


@pytest.mark.usefixtures("on_cpu")
def test_a_state_put_back_is_captured_anew(data: Data) -> None:
    """The tensors of the optimiser are then other ones."""

    def losses(trainer: Trainer, epoch: int) -> dict[str, float]:
        with trainer.generator():
            for batch in trainer.batches(data.train, 20, seed=0, epoch=epoch):
                trainer.step(batch)
        return trainer.read_losses()

    trainer = Trainer(*pair(), total_steps=40, engine="cuda_graph", compile=False, window=10)
    losses(trainer, 0)
    tensors, meta = trainer.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    wanted = losses(trainer, 1)
    trainer.restore(kept, meta)
    assert losses(trainer, 1) == wanted
    assert RecordingCapture.last.recordings == 2


@pytest.mark.usefixtures("on_cpu")
def test_a_compiled_run_captures_the_graph() -> None:
    trainer = Trainer(*pair(), total_steps=1, engine="cuda_graph")
    assert isinstance(trainer.engine, GraphEngine)
    assert isinstance(Trainer(*pair(), total_steps=1, engine="cuda_graph", compile=False).engine, EagerEngine)


@pytest.mark.usefixtures("on_cpu")
def test_gathered_batches_are_trained_on_without_a_capture(data: Data) -> None:
    """What is called with data and not with their positions does as the eager engine does."""
    states = []
    for engine in ("eager", "cuda_graph"):
        trainer = Trainer(*pair(), total_steps=10, engine=engine, compile=False)
        with trainer.generator():
            for batch in data.train.batches(20, seed=0, epoch=0, drop_last=True):
                trainer.step(batch)
        states.append(program_state(trainer.model, trainer.guide))
    assert same(*states)


def test_without_a_gpu_the_graph_engine_takes_over(data: Data) -> None:
    run, state = train(data, engine="cuda_graph")
    assert run.notes == ["engine 'cuda_graph' needs a CUDA device, got cpu: engine 'graph' in its place"]
    _, wanted = train(data, engine="graph")
    assert same(state, wanted)


class Plain(torch.optim.Optimizer):
    """Steepest descent, by hand."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad


class Listening(LinearModel):
    """A model that wants to be told of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def on_step(self, args: Any, index: Tensor, step: int, total_steps: int) -> None:
        self.steps += 1


class Waiting(LinearModel):
    """A model whose Python looks at a number on the device."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if x.sum().item() > 1e9:
            raise AssertionError
        return super().forward(x, y)


def linear() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return LinearModel(), LinearGuide()


def listening() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Listening(), LinearGuide()


def waiting() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Waiting(), LinearGuide()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("programs", "settings", "reason", "instead"),
    [
        (
            listening,
            {},
            "needs a model that asks for nothing between steps, got Listening, which does",
            "graph",
        ),
        (
            linear,
            {"optimizer": Plain},
            "needs an optimiser with the option 'capturable', got Plain",
            "graph",
        ),
        (
            waiting,
            {},
            "cannot capture this step (called a synchronizing operation: aten::_local_scalar_dense)",
            "eager",
        ),
    ],
)
def test_what_cannot_be_captured_is_trained_by_the_next_engine_and_said(
    programs: Any, settings: Any, reason: str, instead: str
) -> None:
    x, rows = torch.randn(60, 5), []
    run, state = train(x, programs, engine="cuda_graph", **settings)
    assert run.notes == [f"engine 'cuda_graph' {reason}: engine '{instead}' in its place"]
    _, wanted = train(x, programs, engine=instead, callbacks=[lambda run, row: rows.append(row)], **settings)
    assert same(state, wanted)
    assert [row["loss"] for row in rows] == [row["loss"] for row in run.history]
    if isinstance(run.model, Listening):
        assert run.model.steps == run.steps


@pytest.mark.usefixtures("on_cpu")
def test_streamed_data_are_not_gathered_on_the_device() -> None:
    x = torch.randn(60, 5)
    streamed = from_datasets(
        TensorDataset(x), name="linear", fingerprint="1", levels=None, scale="real", num_workers=0
    )
    run, _ = train(streamed.train, linear, engine="cuda_graph")
    reason = "needs data that lie on the device, got data that are read as they are needed"
    assert run.notes == [f"engine 'cuda_graph' {reason}: engine 'graph' in its place"]
    assert run.steps == 9


class Stumbling(LinearGuide):
    """Has running statistics, and fails once, when those have moved and a number is drawn."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6))  # type: ignore[assignment]
        self.calls, self.fails_at = 0, fails_at

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            self.encoder(x + torch.randn(()))
            raise RuntimeError("stumbled.\nand more")
        return super().forward(x, y)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("fails_at", [2, 4, 5])  # the first call is the check; the fifth is captured
def test_a_step_that_fails_leaves_nothing_to_the_one_in_its_place(fails_at: int) -> None:
    def programs(fails_at: int) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return LinearModel(), Stumbling(fails_at)

    x = torch.randn(60, 5)
    _, wanted = train(x, lambda: programs(-1))
    run, state = train(x, lambda: programs(fails_at), engine="cuda_graph")
    assert run.notes == [
        "engine 'cuda_graph' cannot capture this step (stumbled): engine 'eager' in its place"
    ]
    assert same(state, wanted)


def counting(size: int = 3) -> tuple[WholeStep, Tensor]:
    """A step that writes its first position and its number into its slot."""
    seen = torch.zeros(size, 2, dtype=torch.float64)

    def body(index: Tensor, scalars: Tensor, slot: Tensor) -> None:
        seen.index_copy_(0, slot, torch.stack([index[0].double(), scalars[0]]).unsqueeze(0))

    return WholeStep(body, RecordingCapture(CPU), size, CPU), seen


def test_a_whole_step_finds_its_row_in_its_slot() -> None:
    whole, seen = counting()
    for first in range(0, 9, 3):
        assert not whole.expects(first, 0)
        whole.send(first, 0, [[10.0 * step] for step in range(first, first + 3)])
        for slot in range(3):
            assert whole.expects(first + slot, slot)
            whole(torch.tensor([first + slot, 99]))
        assert seen.tolist() == [[step, 10.0 * step] for step in range(first, first + 3)]
    assert whole.captured


def test_a_whole_step_begins_at_any_slot_and_says_when_its_rows_are_used_up() -> None:
    whole, seen = counting()
    whole.send(7, 1, [[1.0]])
    assert not whole.expects(7, 0)
    assert not whole.expects(8, 1)
    whole(torch.tensor([5]))
    assert seen.tolist() == [[0.0, 0.0], [5.0, 1.0], [0.0, 0.0]]
    assert not whole.expects(8, 2)


def test_memory_that_runs_out_is_no_reason_to_go_on_otherwise() -> None:
    def body(index: Tensor, scalars: Tensor, slot: Tensor) -> None:
        raise torch.OutOfMemoryError("out")

    whole = WholeStep(body, RecordingCapture(CPU), 1, CPU)
    whole.send(0, 0, [[0.0]])
    with pytest.raises(torch.OutOfMemoryError):
        whole(torch.zeros(1, dtype=torch.int64))


def test_what_a_program_raises_itself_is_raised() -> None:
    def body(index: Tensor, scalars: Tensor, slot: Tensor) -> None:
        raise ValueError("x must be small")

    whole = WholeStep(body, RecordingCapture(CPU), 1, CPU)
    whole.send(0, 0, [[0.0]])
    with pytest.raises(ValueError, match="x must be small"):
        whole(torch.zeros(1, dtype=torch.int64))


def test_a_failure_is_told_in_its_first_line() -> None:
    def body(index: Tensor, scalars: Tensor, slot: Tensor) -> None:
        raise RuntimeError("not this.\nfor reasons")

    whole = WholeStep(body, RecordingCapture(CPU), 1, CPU)
    whole.send(0, 0, [[0.0]])
    with pytest.raises(NotCapturable, match=r"^cannot capture this step \(not this\)$"):
        whole(torch.zeros(1, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
class TestOnAGpu:
    """What only a device can show; everything else about a captured step is tested above."""

    @pytest.fixture(autouse=True)
    def _as_it_was(self) -> Iterator[None]:
        yield
        torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamax", "sgd"])
    def test_a_captured_run_is_the_eager_run(self, data: Data, optimizer: str) -> None:
        """The same noise: a replay draws from the generator as the operations one by one would."""
        options: dict[str, Any] = {"optimizer": optimizer, "device": "cuda", "ema": 0.9, **SCHEDULED}
        run, wanted = train(data, **options)
        captured, state = train(data, engine="cuda_graph", **options)
        assert captured.notes == []
        torch.testing.assert_close(state, wanted, rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(captured.history, run.history, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize("programs", [ladder_pair, profiled_programs])
    def test_other_programs_are_captured_too(self, data: Data, programs: Any) -> None:
        x = data.train.x[:60] if programs is ladder_pair else torch.randn(60, 5)
        _, wanted = train(x, programs, device="cuda")
        run, state = train(x, programs, device="cuda", engine="cuda_graph")
        assert run.notes == []
        torch.testing.assert_close(state, wanted, rtol=1e-3, atol=1e-4)

    def test_one_step_has_the_gradients_of_the_eager_one(self, data: Data) -> None:
        """With the same parameters and the same noise, at a step that is replayed."""
        trainers = []
        for engine in ("eager", "cuda_graph"):
            model, guide = (program.to("cuda") for program in pair())
            # At a rate of nothing parameters stay, so that all steps are at the same place.
            trainer = Trainer(model, guide, total_steps=10, lr=1e-30, engine=engine, compile=False)
            with trainer.generator():
                for batch in trainer.batches(data.train.to("cuda"), 20, seed=0, epoch=0):
                    trainer.step(batch)
            trainers.append(trainer)
        eager, captured = trainers
        assert captured._whole is not None
        assert captured._whole.captured
        torch.testing.assert_close(captured.check_losses(), eager.check_losses(), rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(captured.parameters, eager.parameters, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("precision", ["float32", "bf16"])
    def test_replayed_steps_never_wait_and_draw_anew(self, data: Data, precision: str) -> None:
        model, guide = (program.to("cuda") for program in pair())
        trainer = Trainer(
            model, guide, total_steps=10, engine="cuda_graph", compile=False, precision=precision
        )
        assert isinstance(CudaCapture(trainer.device), CudaCapture)
        with trainer.generator():
            for step, index in enumerate(trainer.batches(data.train.to("cuda"), 20, seed=0, epoch=0)):
                if step == 5:
                    torch.cuda.set_sync_debug_mode("error")
                trainer.step(index)
            torch.cuda.set_sync_debug_mode("default")
        assert trainer.notes == []
        losses = trainer.check_losses()[:, 0]
        assert losses.isfinite().all()
        assert len(losses.unique()) == 10

    def test_a_captured_run_is_resumed(
        self, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options: dict[str, Any] = {"engine": "cuda_graph", "device": "cuda", **SCHEDULED}
        _, wanted = train(data, **options)
        interrupt_after(13, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            train(data, out=tmp_path, **options)
        monkeypatch.undo()
        _, state = train(data, out=tmp_path, resume=True, **options)
        torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-5)

    def test_a_step_that_waits_is_trained_by_the_eager_engine(self) -> None:
        x = torch.randn(60, 5)
        run, state = train(x, waiting, device="cuda", engine="cuda_graph")
        assert len(run.notes) == 1
        assert run.notes[0].startswith("engine 'cuda_graph' cannot capture this step (called a sync")
        _, wanted = train(x, waiting, device="cuda")
        torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_a_compiled_graph_is_captured(self, data: Data) -> None:
        """Its draws are others: the loss falls as far."""
        run, _ = train(data, device="cuda", epochs=20)
        captured, _ = train(data, device="cuda", epochs=20, engine="cuda_graph", compile=True)
        assert captured.notes == []
        assert captured.history[-1]["loss"] == pytest.approx(run.history[-1]["loss"], rel=0.02)
