"""A NaN stops training with a sentence, where it arose, and nothing that is kept has seen it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.data import from_tensors
from pvae.evaluation import fit_classifier
from pvae.experiments.bench.training import SyncCounter
from pvae.inference import NonFiniteLoss, Run, Trainer, fit, load_parameters
from pvae.inference.program import parameters_of, program_state
from tests.inference.programs import LinearGuide, LinearModel

from .programs import BLACK, NormGuide, Overflow, data, programs

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "log_every": 2, "progress": False}


def state(*pair: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in program_state(*pair).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fatal(step_of: int = BLACK) -> int:
    """The step of the first epoch whose batch has that datum."""
    batches = data().train.batches(4, seed=0, epoch=0, drop_last=True)
    return next(step for step, batch in enumerate(batches) if step_of in batch.index.tolist())


def sound(steps: int, **settings: Any) -> dict[str, Tensor]:
    """Programs after so many steps, which must be few enough to be sound."""
    pair = programs()
    fit(*pair, data(), **SETTINGS | settings | {"epochs": None, "steps": steps})
    return state(*pair)


@pytest.mark.parametrize(
    "settings",
    [{}, {"grad_clip": 0.5}, {"engine": "graph", "compile": False}, {"optimizer": "sgd"}, {"ema": 0.9}],
    ids=str,
)
def test_a_gradient_names_its_parameter_and_its_data(settings: dict[str, Any], tmp_path: Path) -> None:
    pair, step = programs(), fatal()
    assert step > 2
    with pytest.raises(NonFiniteLoss) as caught:
        fit(*pair, data(), out=tmp_path, checkpoint_every=0, **SETTINGS | settings)
    said = re.fullmatch(
        r"the gradient norm of guide\.w became non-finite at step (\d+) on training data \[(.*)\]; "
        "the last checkpoint is sound",
        str(caught.value),
    )
    assert said is not None, str(caught.value)
    assert int(said[1]) == step
    assert str(BLACK) in said[2].split(", ")
    assert (caught.value.step, ", ".join(map(str, caught.value.index))) == (step, said[2])
    # What the programs hold is what they held at the last row before, and so does the checkpoint.
    row = step // 2 * 2
    raw = {k: v for k, v in settings.items() if k != "ema"}
    assert same(state(*pair), sound(row, **raw))
    fresh = programs()
    assert load_parameters(tmp_path, *fresh, "last")["step"] == row
    assert same(state(*fresh), sound(row, **raw))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(2, row + 1, 2))


@pytest.mark.parametrize("log_every", [1, 7, 100])
def test_the_last_step_of_a_run_is_looked_at_too(log_every: int) -> None:
    pair, step = programs(), fatal()
    settings = SETTINGS | {"epochs": None, "steps": step + 1, "log_every": log_every}
    with pytest.raises(NonFiniteLoss, match=rf"guide\.w became non-finite at step {step} .*{BLACK}"):
        fit(*pair, data(), **settings)
    assert all(tensor.isfinite().all() for tensor in state(*pair).values())


def test_at_the_first_row_the_start_is_the_last_good_state() -> None:
    pair = programs()
    before = state(*pair)
    with pytest.raises(NonFiniteLoss, match="the gradient norm of"):
        fit(*pair, data(), **SETTINGS | {"log_every": 10})
    assert same(state(*pair), before)


class OverflowGuide(LinearGuide):
    """The gradient of every weight of the encoder is infinite where the batch has the black datum."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        where = (x == 0).all(-1).any()
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = Overflow.apply(self.encoder(x), where).chunk(2, -1)
            return pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_infinite_gradients_count_the_parameters_they_reach(grad_clip: float | None) -> None:
    """Clipping would divide them by infinity, and go on with a step of zero."""
    with pytest.raises(
        NonFiniteLoss,
        match=rf"gradient norm of guide\.encoder\.weight \(and 1 more\) became non-finite at step {fatal()} ",
    ):
        fit(*programs(OverflowGuide), data(), **SETTINGS | {"grad_clip": grad_clip})


class BlindGuide(LinearGuide):
    """Does not look at x."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(torch.zeros_like(x))


def test_a_gradient_whose_square_overflows_is_not_finite_either() -> None:
    """Adam keeps the square: past it, the parameter would stand still for ever, and nothing would say so."""
    x = data(black=False).train.x.clone()
    x[BLACK, :2] = 1.8e19  # the loss is 3.2e38, and so finite
    with pytest.raises(NonFiniteLoss, match=r"^the gradient norm of model\.decoder\..* data \[17\]"):
        fit(*programs(BlindGuide), from_tensors(x), **SETTINGS | {"batch_size": 1})


def test_a_loss_comes_before_its_own_gradient() -> None:
    x = data(black=False).train.x.clone()
    x[BLACK] = 1e30
    pair, step = programs(LinearGuide), fatal()
    with pytest.raises(NonFiniteLoss, match=rf"^reconstruction became non-finite at step {step} .*{BLACK}"):
        fit(*pair, from_tensors(x), **SETTINGS)
    assert all(tensor.isfinite().all() for tensor in state(*pair).values())


def test_a_schedule_that_breaks_the_parameters_is_told_from_gradients() -> None:
    pair = programs(LinearGuide)

    def broken(step: int, total: int) -> float:
        return math.nan if step == 5 else 1.0

    with pytest.raises(NonFiniteLoss) as caught:
        fit(*pair, data(), **SETTINGS | {"schedule": broken})
    assert str(caught.value) == (
        "parameter model.decoder.weight became non-finite in the steps 4 ... 5, with finite losses and "
        "gradients: the learning rate or the optimizer made it so"
    )
    wanted = programs(LinearGuide)
    fit(*wanted, data(), **SETTINGS | {"epochs": None, "steps": 4})
    assert same(state(*pair), state(*wanted))


def test_a_validation_loss_names_the_data_and_the_run_stops(tmp_path: Path) -> None:
    valid = torch.zeros(6, 5)
    valid[4] = 1e30
    with pytest.raises(NonFiniteLoss) as caught:
        fit(*programs(LinearGuide), data(valid=valid), out=tmp_path, **SETTINGS)
    assert str(caught.value).startswith(
        "the validation loss became non-finite at step 10 on validation data [4]"
    )
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


class Brittle(LinearModel):
    """Raises where a weight is NaN, long before anybody looks at the loss."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        torch.linalg.cholesky(torch.diag(self.decoder.bias.detach().square() + 1))
        return super().forward(x, y)


def test_an_error_that_follows_from_a_nan_is_told_as_the_nan() -> None:
    torch.manual_seed(0)
    model, guide = Brittle(), NormGuide()
    with pytest.raises(NonFiniteLoss, match=rf"guide\.w became non-finite at step {fatal()} "):
        fit(model, guide, data(), **SETTINGS | {"log_every": 10})
    assert all(tensor.isfinite().all() for tensor in state(model, guide).values())


class Failing(LinearModel):
    """Raises in its ninth call."""

    calls = 0

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.calls == 9:
            raise RuntimeError("the disk of the model is full")
        return super().forward(x, y)


def test_another_error_in_a_step_is_passed_on() -> None:
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"^the disk of the model is full$"):
        fit(Failing(), LinearGuide(), data(), **SETTINGS | {"log_every": 10})


def test_parameters_must_be_finite_before_training() -> None:
    model, guide = programs(LinearGuide)
    with torch.no_grad():
        guide.encoder.bias[1] = math.inf
    with pytest.raises(ValueError, match=r"^parameter guide\.encoder\.bias must be finite before training"):
        fit(model, guide, data(), **SETTINGS)


def test_buffers_go_back_with_the_parameters() -> None:
    model, guide = programs()
    model.decoder = nn.Sequential(model.decoder, nn.BatchNorm1d(5))  # type: ignore[assignment]
    before = state(model, guide)
    with pytest.raises(NonFiniteLoss):
        fit(model, guide, data(), **SETTINGS | {"log_every": 10})
    assert same(state(model, guide), before)
    assert "model.decoder.1.running_mean" in before


def test_a_callback_that_poisons_the_weights_does_not_reach_the_last_good_state() -> None:
    pair = programs(LinearGuide)

    def poison(run: Run, row: dict[str, float]) -> None:
        if row["step"] == 4:
            dict(run.model.named_parameters())["decoder.bias"].data.fill_(math.nan)

    with pytest.raises(NonFiniteLoss, match=r"^reconstruction became non-finite at step 4 "):
        fit(*pair, data(), callbacks=[poison], **SETTINGS)
    wanted = programs(LinearGuide)
    fit(*wanted, data(), **SETTINGS | {"epochs": None, "steps": 4})
    assert same(state(*pair), state(*wanted))


def trained(grad_clip: float | None, steps: int = 5, **more: Any) -> Trainer:
    trainer = Trainer(*programs(), total_steps=100, lr=1e-2, grad_clip=grad_clip, window=8, **more)
    with trainer.generator():
        batches = data(black=False).train.batches(4, seed=0, epoch=0, drop_last=True)
        for _, batch in zip(range(steps), batches, strict=False):
            trainer.step(batch)
    return trainer


@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_looking_waits_for_nothing_in_a_step(grad_clip: float | None) -> None:
    trainer = trained(grad_clip, steps=1)
    batch = next(data(black=False).train.batches(4, seed=1, epoch=0, drop_last=True))
    with trainer.generator(), SyncCounter() as counter:
        trainer.step(batch)
    assert counter.count == 0


def test_clipping_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms are taken once, for both; a parameter without a gradient has none."""
    ours = trained(0.05)

    def clip(parameters: Any, most: float, total: Tensor, foreach: bool) -> None:
        assert torch.equal(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]), total)
        nn.utils.clip_grad_norm_(parameters, most, foreach=foreach)

    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", clip)
    theirs = trained(0.05)
    assert same(state(ours.model, ours.guide), state(theirs.model, theirs.guide))
    assert ours.guide.get_parameter("spare").grad is None


def test_one_copy_of_the_programs_is_kept() -> None:
    trainer = trained(None)
    kept = trainer.watch._kept
    assert sum(t.numel() for t in kept) == sum(
        t.numel() for m in (trainer.model, trainer.guide) for t in (*m.parameters(), *m.buffers())
    )
    assert trainer.watch._norms.shape == (8, len(parameters_of(trainer.model, trainer.guide)))


def test_a_classifier_that_diverges_is_not_returned() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    train = from_tensors(x, y=torch.arange(40) % 2).train
    with pytest.raises(ValueError, match=r"^lr must leave the classifier's weights finite, got 1e\+30"):
        fit_classifier(train, epochs=2, batch_size=8, lr=1e30, progress=False)
