"""What is measured on training data, at the end of a run and alone: sigma, the variances of a diffusion."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pvae.data import Data, from_tensors
from pvae.evaluation import log_likelihood
from pvae.guides import NormalGuide
from pvae.inference import calibrate_diffusion, fit, load_parameters, measure_sigma, registered
from pvae.inference.isolation import Generators
from pvae.inference.program import program_state
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPDenoiser, MLPEncoder
from pvae.priors import DiffusionPrior

from .profiled import profiled_programs
from .programs import LinearGuide, LinearModel


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(5)
    x = 0.4 * torch.randn(260, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    return from_tensors(x[:200], valid=x[200:230], test=x[230:], name="linear")


def train(data: Data, model: nn.Module, guide: nn.Module, **settings: Any) -> Any:
    return fit(
        model, guide, data, **{"epochs": 3, "batch_size": 20, "lr": 1e-2, "progress": False, **settings}
    )


def reconstructions(model: Any, guide: Any, x: Tensor, seed: int) -> Tensor:
    """The decoder's output for one draw of z each, from the generator as it stands after seeding."""
    with torch.no_grad():
        torch.manual_seed(seed)
        loc, scale = guide.encoder(x)
        return model.decoder(loc + scale * torch.normal(torch.zeros_like(loc), torch.ones_like(loc)))


@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("clamp", ["hard", "soft"])
def test_it_is_the_root_mean_square_error_of_the_reconstructions(
    data: Data, channels: int | None, clamp: Any
) -> None:
    model, guide = profiled_programs(channels=channels, clamp=clamp, floor=0.2)
    sigma = measure_sigma(model, guide, data.train, seed=3)
    errors = (data.train.x - reconstructions(model, guide, data.train.x, 3)).double().numpy()
    wanted = np.sqrt((errors**2).mean(0 if channels else None))
    floored = {"hard": np.maximum(wanted, 0.2), "soft": np.exp(math.log(0.2) + np.log1p(wanted / 0.2))}
    np.testing.assert_allclose(sigma.numpy(), floored[clamp], rtol=1e-6)
    assert torch.equal(sigma, model.likelihood.sigma)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200, 1000])
def test_batches_of_any_size_weigh_by_their_data(data: Data, batch_size: int) -> None:
    model, guide = profiled_programs()
    model, guide = model.double(), guide.double()

    class Certain(nn.Module):
        """A guide without noise, so that the draws do not depend on the batches."""

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Delta(guide.encoder(x.double())[0], event_dim=1))

    sigma = measure_sigma(model, Certain(), data.train, batch_size=batch_size)
    with torch.no_grad():
        x = data.train.x.double()
        wanted = (x - model.decoder(guide.encoder(x)[0])).square().mean().sqrt()
    torch.testing.assert_close(sigma, wanted, rtol=1e-13, atol=0)


def test_only_sigma_changes(data: Data) -> None:
    model, guide = profiled_programs()
    model.train()
    guide.eval()
    before = {name: tensor.clone() for name, tensor in program_state(model, guide).items()}
    generators = Generators.now(torch.device("cpu"))
    first = measure_sigma(model, guide, data.train)
    after = Generators.now(torch.device("cpu"))
    assert torch.equal(generators.tensors["cpu"], after.tensors["cpu"])
    assert torch.equal(generators.tensors["numpy"], after.tensors["numpy"])
    assert generators.meta == after.meta
    assert (model.training, model.likelihood.training, guide.training) == (True, True, False)
    state = program_state(model, guide)
    assert [name for name in state if not torch.equal(state[name], before[name])] == [
        "model.likelihood.measured_sigma"
    ]
    assert torch.equal(measure_sigma(model, guide, data.train), first)
    assert not torch.equal(measure_sigma(model, guide, data.train, seed=1), first)
    assert first is not model.likelihood.sigma


def test_a_conditional_model_is_given_its_labels() -> None:
    x = torch.tensor([[0.0], [0.0], [3.0], [3.5]])
    data = from_tensors(x, y=torch.tensor([0, 0, 1, 1]), name="labelled")

    class Offset(nn.Module):
        """x ~ N(3 y, sigma^2), with a z that does nothing."""

        conditional = True

        def __init__(self) -> None:
            super().__init__()
            self.likelihood = Normal("frozen")

        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", self.likelihood(3.0 * y.unsqueeze(-1)), obs=x)

    class Plain(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))

    assert measure_sigma(Offset(), Plain(), data.train).item() == pytest.approx(0.25)


def test_a_finished_run_is_scored_with_the_sigma_of_its_training_data(data: Data, tmp_path: Path) -> None:
    model, guide = profiled_programs()
    with pytest.raises(ValueError, match=r"sigma = 'batch' .* must be measured before held-out data"):
        log_likelihood(model, guide, data.test, num_particles=5)
    train(data, model, guide, out=tmp_path)
    errors = data.train.x - reconstructions(model, guide, data.train.x, 0)
    assert model.likelihood.sigma.item() == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-6)
    estimate = log_likelihood(model, guide, data.test, num_particles=50)
    fixed = copy.deepcopy(model)
    fixed.likelihood = Normal(value=model.likelihood.sigma.item())
    wanted = log_likelihood(fixed, guide, data.test, num_particles=50)
    torch.testing.assert_close(estimate.log_prob, wanted.log_prob)
    loaded = profiled_programs(seed=1)
    load_parameters(tmp_path, *loaded)
    again = log_likelihood(*loaded, data.test, num_particles=50)
    assert torch.equal(again.log_prob, estimate.log_prob)
    # A checkpoint from within the run has no measured sigma.
    load_parameters(tmp_path, *loaded, "last")
    with pytest.raises(ValueError, match="must be measured"):
        log_likelihood(*loaded, data.test, num_particles=5)


@pytest.mark.parametrize("settings", [{"ema": 0.9}, {"patience": 1, "epochs": 60, "lr": 0.1}])
def test_it_is_measured_at_the_parameters_that_remain(data: Data, settings: dict[str, Any]) -> None:
    model, guide = profiled_programs()
    run = train(data, model, guide, seed=2, **settings)
    assert run.stopped == ("early" if "patience" in settings else "finished")
    errors = data.train.x - reconstructions(model, guide, data.train.x, 2)
    assert model.likelihood.sigma.item() == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-6)


def test_validation_during_training_has_the_sigma_of_the_moving_average(data: Data) -> None:
    model, guide = profiled_programs()
    seen: list[float] = []

    def check(run: Any, row: dict[str, float]) -> None:
        likelihood = model.likelihood
        assert likelihood.measured_sigma.item() == 0
        x = data.valid.x
        with torch.no_grad():
            torch.manual_seed(20_140_501)
            loc, scale = guide.encoder(x)
            z = loc + scale * torch.normal(torch.zeros_like(loc), torch.ones_like(loc))
            log_x = dist.Normal(model.decoder(z), likelihood.sigma).log_prob(x).sum(-1)
            kl = dist.Normal(loc, scale).log_prob(z).sum(-1) - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        assert row["valid_loss"] == pytest.approx((kl - log_x).mean().item(), rel=1e-5)
        seen.append(likelihood.sigma.item())

    train(data, model, guide, callbacks=[check])
    assert len(set(seen)) == 3


def test_an_optimal_sigma_trains_better_than_a_unit_one(data: Data) -> None:
    model, guide = profiled_programs()
    run = train(data, model, guide, epochs=60)
    unit, unit_guide = profiled_programs()
    unit.likelihood = Normal()
    reference = train(data, unit, unit_guide, epochs=60)
    assert run.best < reference.best - 0.5
    assert model.likelihood.sigma < 0.9


def test_after_stock_svi_it_is_measured_on_request(data: Data) -> None:
    model, guide = profiled_programs()
    optimiser = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(registered(model, "model"), registered(guide, "guide"), optimiser, Trace_ELBO())
    losses = [svi.step(data.train.x) for _ in range(60)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="must be measured"):
        log_likelihood(model, guide, data.test, num_particles=5)
    measure_sigma(model, guide, data.train)
    assert log_likelihood(model, guide, data.test, num_particles=5).log_prob.isfinite().all()


@pytest.mark.parametrize(("likelihood", "got"), [(Bernoulli(), "Bernoulli"), (Normal(), "fixed")])
def test_a_likelihood_without_such_a_sigma_is_refused(data: Data, likelihood: nn.Module, got: str) -> None:
    model, guide = profiled_programs()
    model.likelihood = likelihood  # type: ignore[assignment]
    with pytest.raises(TypeError, match=f"must be a Normal with sigma 'batch' or 'frozen', got {got}"):
        measure_sigma(model, guide, data.train)
    with pytest.raises(TypeError, match="got NoneType"):
        measure_sigma(LinearModel(), LinearGuide(), data.train)


def test_what_cannot_be_measured_is_refused(data: Data) -> None:
    model, guide = profiled_programs()

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.likelihood = model.likelihood

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", model.prior(None))
                pyro.sample("image", self.likelihood(model.decoder(z), x), obs=x)

    with pytest.raises(ValueError, match="model must observe a site 'x', got sites z, image"):
        measure_sigma(Renamed(), guide, data.train)
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="sigma must be positive and finite, got nan"):
        measure_sigma(model, guide, data.train)
    assert model.likelihood.measured_sigma == 0


def diffusion_programs(num_steps: int = 6) -> tuple[VAE, NormalGuide]:
    torch.manual_seed(2)
    prior = DiffusionPrior(MLPDenoiser((2,), 8, 1), (2,), num_steps=num_steps)
    model = VAE(prior, MLPDecoder(2, (5,), (8,)), Normal())
    return model, NormalGuide(MLPEncoder((5,), 2, (8,)))


def test_a_diffusion_is_calibrated_on_draws_of_the_guide(data: Data) -> None:
    model, guide = diffusion_programs()
    before, generators = program_state(model, guide), Generators.now(torch.device("cpu"))
    calibrate_diffusion(model, guide, data.train, seed=3, batch_size=70)
    prior = model.prior
    assert isinstance(prior, DiffusionPrior)
    assert prior.calibrated
    after = program_state(model, guide)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.rsplit(".", 1)[-1] for name in moved} == {"mse"}
    assert torch.equal(generators.tensors["cpu"], Generators.now(torch.device("cpu")).tensors["cpu"])
    # By hand: the squared error of the noise at each step, with other draws.
    with torch.no_grad():
        loc, scale = guide.encoder(data.train.x)
        z = (loc + scale * torch.randn(500, *loc.shape)).double()
        low, high = -7.0, 7.0
        for i in range(6):
            gamma = torch.tensor(low + (high - low) * (i + 1) / 6, dtype=torch.float64)
            alpha, sigma = (1 / (1 + gamma.exp())) ** 0.5, (1 / (1 + (-gamma).exp())) ** 0.5
            eps = torch.randn_like(z)
            y = (alpha * z + sigma * eps).float()
            guess = sigma * y + alpha * prior.denoiser(y, gamma.float())
            wanted = (eps - guess).square().mean((0, 1))
            assert torch.allclose(prior.mse[i].double(), wanted, rtol=0.5)


def test_a_run_ends_calibrated_and_is_loaded_so(data: Data, tmp_path: Path) -> None:
    model, guide = diffusion_programs()
    train(data, model, guide, epochs=1, out=tmp_path)
    assert model.prior.calibrated
    again, its_guide = diffusion_programs()
    load_parameters(tmp_path, again, its_guide)
    assert again.prior.calibrated
    assert torch.equal(again.prior.mse, model.prior.mse)  # type: ignore[arg-type]


def test_validation_is_the_bound_of_training(data: Data) -> None:
    """By a path of a prior not yet calibrated, a validation loss would be far off and fall when it is."""
    model, guide = diffusion_programs(num_steps=2)
    run = train(data, model, guide, epochs=1, lr=1e-9)
    prior: Any = model.prior
    with torch.no_grad(), prior.using("vlb", num_times=1000):
        trace = pyro.poutine.trace(guide).get_trace(data.valid.x)
        replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace=trace)).get_trace(data.valid.x)
        elbo = (replayed.log_prob_sum() - trace.log_prob_sum()) / len(data.valid)
    assert run.history[-1]["valid_loss"] == pytest.approx(-float(elbo), abs=1.5)


def test_only_a_diffusion_is_calibrated(data: Data) -> None:
    model, guide = profiled_programs()
    with pytest.raises(TypeError, match="must be a DiffusionPrior, got"):
        calibrate_diffusion(model, guide, data.train)
