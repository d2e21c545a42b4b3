"""The report of a ladder: its pseudoinput against closed forms, planted faults, and the command."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro.distributions import Normal, TorchDistribution
from scipy import stats
from torch import Tensor, nn
from typer.testing import CliRunner

from pvae.data import Split, from_tensors, load
from pvae.experiments import diagnosing, load_spec, open_run
from pvae.experiments.cli import app
from pvae.experiments.diagnosing import Wanted, diagnose
from pvae.experiments.diagnosis_figures import layer_bars
from pvae.experiments.jobs import train
from pvae.experiments.ladder_report import LadderReport, gaussian_rate, ladder_report
from pvae.guides import LadderGuide
from pvae.models import Ladder
from pvae.nn import DCTPseudoinput, LadderSpec, PseudoinputPosterior
from pvae.priors import DiffusionPrior
from tests.data.conftest import real_root
from tests.ladders import jolted, ladder, linear_

pytestmark = pytest.mark.usefixtures("undrawn")

SPEC = LadderSpec((1, 8, 8), ((4, 2), (2, 1)), channels=4)


def images(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shade = torch.rand(num, 1, 1, 1, generator=generator)
    return (torch.rand(num, 1, 8, 8, generator=generator) < shade).float()


def splits(num: int = 60, num_train: int = 80) -> tuple[Split, Split]:
    data = from_tensors(images(num_train, 1), test=images(num, 2))
    return data.test, data.train


def linear_posterior(A: Tensor, variance: Tensor) -> Any:
    def posterior(x: Tensor) -> TorchDistribution:
        return Normal(x.double() @ A.T, variance.sqrt()).to_event(1)

    return posterior


class TestGaussianRate:
    A = torch.tensor([[1.0, 0.5, 0.0], [0.2, -1.0, 0.3]], dtype=torch.float64)
    variance = torch.tensor([0.05, 0.3], dtype=torch.float64)

    def test_is_that_of_scipys_normal_with_the_moments_of_draws(self) -> None:
        x = torch.randn(400, 3, dtype=torch.float64)
        held = torch.randn(5, 3, dtype=torch.float64)
        posterior = linear_posterior(self.A, self.variance)
        found = gaussian_rate(posterior, x, held)
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(2000, 400, 2)) * np.sqrt(self.variance.numpy())
        u = (x @ self.A.T).numpy() + noise
        flat = u.reshape(-1, 2)
        fitted = stats.multivariate_normal(flat.mean(0), np.cov(flat.T))
        for i, loc in enumerate((held @ self.A.T).numpy()):
            r = stats.multivariate_normal(loc, np.diag(self.variance))
            drawn = r.rvs(40_000, random_state=rng)
            rate = (r.logpdf(drawn) - fitted.logpdf(drawn)).mean()
            assert found[i].item() == pytest.approx(rate, abs=0.03)

    def test_is_the_information_of_u_about_x_where_all_is_normal(self) -> None:
        x = torch.randn(60_000, 3, dtype=torch.float64)
        found = gaussian_rate(linear_posterior(self.A, self.variance), x[:30_000], x[30_000:])
        total = (self.A @ self.A.T + self.variance.diag()).numpy()
        exact = 0.5 * math.log(np.linalg.det(total) / self.variance.prod())
        assert float(found.mean()) == pytest.approx(exact, abs=0.02)

    def test_on_the_data_of_the_fit_it_is_a_ratio_of_determinants(self) -> None:
        x = torch.rand(2500, 3, dtype=torch.float64)  # more than one pass, and not normal
        found = gaussian_rate(linear_posterior(self.A, self.variance), x, x)
        total = np.cov((x @ self.A.T).numpy().T, bias=True) + np.diag(self.variance)
        exact = 0.5 * math.log(np.linalg.det(total) / self.variance.prod())
        assert float(found.mean()) == pytest.approx(exact, rel=1e-9)

    def test_of_real_digits(self) -> None:
        """The paper's pseudoinput, 7x7 at a log-variance of -6: 41.6 nats of binary images, 40.5 of grey
        ones, by another implementation.
        """
        root = real_root()
        if root is None or not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
            pytest.skip("needs MNIST under PVAE_DATA")
        data = load("mnist", binarize="dynamic", root=root)
        part = data.train[::3]
        pseudoinput = DCTPseudoinput.from_data(data.train, 7, grey=True)
        posterior = PseudoinputPosterior(pseudoinput, log_variance=-6.0)
        found = gaussian_rate(posterior, part.x, data.test.x)
        assert float(found.mean()) == pytest.approx(41.6, abs=0.6)
        found = gaussian_rate(posterior, part.clean, data.test.clean)
        assert float(found.mean()) == pytest.approx(40.5, abs=0.6)


def drop_context_(model: Ladder) -> None:
    """Make every prior blind to the low-pass image."""
    with torch.no_grad():
        heads: Any = model.top_down.priors
        for head in heads:
            for conv in (head.skip, head.net[0]):
                conv.weight[:, SPEC.channels :] = 0


def planted() -> tuple[Ladder, LadderGuide]:
    """A ladder of one latent whose prior has the mean of the low-pass image and whose posterior that of x."""
    torch.manual_seed(0)
    model, guide = ladder(LadderSpec((1, 8, 8), ((4, 1),), channels=4), u=4, log_variance=-9.0)
    linear_(model, guide)
    prior: Any = model.top_down.priors[0].skip
    posterior: Any = guide.bottom_up.posteriors[0].skip
    stem: Any = guide.bottom_up.stem
    with torch.no_grad():
        for conv in (prior, posterior):
            conv.weight[0] = 0
            conv.bias[0] = 0
        stem.weight[:] = 0
        stem.bias[:] = 0
        stem.weight[0] = 1
        # Posterior: the means of blocks m, centred: 2 m - 1, and the state of ones. Prior: 2 (m / 5) - 1.
        posterior.weight[0, 0] = math.sqrt(2.0)
        posterior.bias[0] = -1.0
        prior.weight[0, 4] = 5.0
        prior.bias[0] = 4.0
        for conv, log_var in ((prior, -0.5), (posterior, -0.5)):
            conv.bias[1] = log_var
    return model, guide


def test_a_pseudoinput_that_is_used() -> None:
    model, guide = planted()
    test, known = splits()
    report = ladder_report(model, guide, test, known)
    assert report.u is not None
    m = test.x.double().unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-3, -1)).flatten(1).numpy()
    # The prior sees u's noise, five times two, in the place of the posterior's mean.
    noise = 16 * 100 * math.exp(-9.0) / (2 * math.exp(-0.5))
    assert report.test["z_1"].mean == pytest.approx(noise, rel=0.1)
    apart = 4 * ((m[:, None] - m[None]) ** 2).sum(-1) / (2 * math.exp(-0.5))
    rise = report.u.exchange.rise
    assert report.u.exchange.used
    error = float(rise.std()) / math.sqrt(len(rise))
    assert float(rise.mean()) == pytest.approx(apart.sum() / (60 * 59), abs=4 * error)
    assert "they look at it" in report.u.to_text()


def test_a_pseudoinput_that_is_not_used() -> None:
    torch.manual_seed(0)
    model, guide = ladder(SPEC, u=2)
    jolted(model, guide, size=0.1)
    drop_context_(model)
    test, known = splits()
    report = ladder_report(model, guide, test, known)
    assert report.u is not None
    assert torch.equal(report.u.exchange.rise, torch.zeros(60, dtype=torch.float64))
    assert list(report.u.exchange.own) == ["z_3", "z_2", "z_1"]
    assert "u is paid for and not used" in report.u.to_text()


def with_diffusion() -> tuple[Ladder, LadderGuide, DiffusionPrior]:
    torch.manual_seed(0)
    prior = DiffusionPrior(Silent(), (1, 2, 2), -6.0, 7.0, prediction="eps", num_steps=20)
    model, guide = ladder(SPEC, u=2, prior=prior, log_variance=-5.0)
    return model.eval(), guide.eval(), prior


class Silent(nn.Module):
    """Predicts no noise."""

    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        return torch.zeros_like(y)


def test_the_rate_of_u_is_that_of_the_bound_and_of_the_chain() -> None:
    model, guide, prior = with_diffusion()
    test, known = splits()
    report = ladder_report(model, guide, test, known, num_train=1000)
    u = report.u
    assert u is not None
    m = 0.2 * test.x.double().unflatten(-1, (2, 4)).unflatten(-3, (2, 4)).mean((-3, -1)).flatten(1).numpy()
    square = m**2 + math.exp(-5.0)
    first, diffusion = 2 * (math.log(2 * math.pi) - 6 + 1), 13 * 4 / 2
    fading, noise = 1 / (1 + math.exp(7)), 1 / (1 + math.exp(-7))
    last = 0.5 * (fading * square + noise - math.log(noise) - 1).sum(-1)
    entropy = 2 * (math.log(2 * math.pi) - 5 + 1)
    expected = first + diffusion + last.mean() - entropy
    error = float(u.rate.std()) / math.sqrt(60)
    assert float(u.rate.mean()) == pytest.approx(expected, abs=4 * error)
    assert torch.equal(u.rate, report.test["u"].kl)
    assert torch.equal(u.rate_train, report.train["u"].kl)
    assert u.rate_steps is not None
    # The chain that predicts no noise on 20 steps without calibration: each costs (e^d - 1) / 2 a number.
    coarse = expected - diffusion + 20 * 4 * math.expm1(13 / 20) / 2
    spread = float(u.rate_steps.std()) / math.sqrt(60)
    assert float(u.rate_steps.mean()) == pytest.approx(coarse, abs=4 * spread)
    assert (u.num_steps, u.calibrated, prior.estimator) == (20, False, None)
    assert not u.trained
    text = u.to_text()
    assert "chain of 20 steps, not calibrated" in text
    assert f"by heart is {math.log(1000):.1f}" in text
    assert "the prior is undertrained" in text
    assert "of u by draws" in report.to_text()


def test_a_prior_as_good_as_the_fit_is_trained() -> None:
    """The prior is the Gaussian of the fit itself: the rates agree datum by datum."""
    torch.manual_seed(0)
    test, known = splits(40, 300)
    model, guide = ladder(SPEC, u=1, log_variance=-5.0)
    assert model.prior is not None
    mean = 0.2 * known.x.mean((-3, -2, -1))
    scale = (mean.var(correction=0) + math.exp(-5.0)).sqrt()
    fitted = Normal(mean.mean().expand(1, 1, 1), scale.expand(1, 1, 1)).to_event(3)
    model.prior.forward = lambda: fitted
    u = ladder_report(model, guide, test, known).u
    assert u is not None
    torch.testing.assert_close(u.rate, u.gaussian, rtol=1e-4, atol=1e-4)
    assert u.trained
    assert u.rate_steps is None
    assert u.fit_cost == pytest.approx(1 * 4 / (4 * 300))
    assert "undertrained" not in u.to_text()


def test_bounds_and_clipping_are_counted() -> None:
    torch.manual_seed(0)
    model, guide = ladder(SPEC, u=2)
    pseudoinput = DCTPseudoinput((1, 8, 8), 2, torch.tensor([[[4.0, 100.0], [100.0, 100.0]]]))
    model.pseudoinput = pseudoinput
    guide.posterior_u = PseudoinputPosterior(pseudoinput, -6.0, bounds=(-9.0, -3.0))
    with torch.no_grad():
        guide.posterior_u.rho[0] = torch.tensor([[-9.5, -3.0], [-4.0, -8.0]])
        heads: Any = model.top_down.priors
        for head in heads:
            head.skip.bias[1] = 40.0
    test, known = splits()
    report = ladder_report(model, guide, test, known, known[:50])
    u = report.u
    assert u is not None
    assert u.share_at_bounds == 0.5
    assert u.bounds == (-9.0, -3.0)
    torch.testing.assert_close(u.log_variance[0], torch.tensor([[-9.0, -3.0], [-4.0, -8.0]]))
    # The first coefficient is an eighth of the sum of 64 pixels.
    shares = [float((part.x.sum((-3, -2, -1)) / 8 > 4).double().mean()) / 4 for part in (test, known)]
    assert u.clipped == pytest.approx(shares)
    assert u.num_fit == 50
    assert report.test["u"].at_bounds is None
    for name in SPEC.names:
        found = report.test[name].at_bounds
        assert found is not None
        assert found["p"] == (0.0, 1.0)
        assert max(found["q"]) < 0.05
    text = u.to_text()
    assert "mean -6.00, 50.0 % of 4 at an end of [-9, -3]" in text
    assert f"clipped: {100 * shares[0]:.3f} % of the coefficients" in text


def pictured(report: LadderReport, path: Path) -> Any:
    from matplotlib.image import imread

    shown = imread(layer_bars(report, path, "a title"))[..., :3]
    assert 0.3 < (shown > 0.99).all(-1).mean() < 0.99
    return shown


def test_reports_and_pictures_with_and_without_u(tmp_path: Path) -> None:
    test, known = splits()
    model, guide, _ = with_diffusion()
    with_u = ladder_report(model, guide, test, known)
    plain = ladder_report(*ladder(SPEC, u=None), test, known)
    assert plain.u is None
    assert [layer.name for layer in plain.test.layers] == list(SPEC.names)
    assert "by draws" not in plain.to_text()
    assert json.loads(json.dumps(plain.to_dict()))["u"] is None
    record = json.loads(json.dumps(with_u.to_dict()))
    assert record["u"]["rate"]["mean"] == pytest.approx(record["test"]["layers"]["u"]["kl"])
    assert set(record["u"]["exchange"]["layers"]) == set(SPEC.names)
    high, low = (pictured(report, tmp_path / f"{i}.png") for i, report in enumerate((with_u, plain)))
    assert high.shape[0] > 500
    assert low.shape[0] > 500
    bare = copy.deepcopy(plain)
    for layer in (*bare.test.layers, *bare.train.layers):
        object.__setattr__(layer, "kl_map", None)
    assert pictured(bare, tmp_path / "bare.png").shape[0] < high.shape[0]


TINY = [
    "fit.epochs=none",
    "fit.steps=3",
    "fit.beta_warmup=0",
    "evaluate.after_training=false",
    "decoder.channels=4",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(load_spec("dvp-tiny", [*TINY, "prior.hidden=8"]), folder / "dvp", progress=False)
    train(load_spec("dvp-tiny", [*TINY, "prior=none", "pseudoinput=none"]), folder / "plain", progress=False)
    pair = ["data=digits", "encoder.hidden=[8]", "prior.components=5", "z_dim=3", "decoder.z_1_dim=2"]
    train(load_spec("hvae-mnist", [*TINY[:4], *pair]), folder / "hvae", progress=False)
    return folder


def command(*arguments: object) -> str:
    """What a diagnosis says of the latents."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--only", "latents"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_diagnosis_of_a_ladder(runs: Path) -> None:
    text = command("diagnose", runs / "dvp", "--num-data", 40)
    for heading in ("layers", "pseudoinput", "prior against aggregate posterior"):
        assert f"\n{heading}\n\n" in f"\n{text}"
    assert "not computed: the density of a latent under the mixture" in text
    assert "coverage\n" not in text
    assert "40 held-out data, 40 of training" in text
    assert "fitted to 1297 training data" in text
    assert "calibrated" in text
    assert (runs / "dvp" / "figures" / "layers.png").is_file()
    assert not (runs / "dvp" / "figures" / "alignment.png").exists()
    record = json.loads((runs / "dvp" / "diagnosis.json").read_text())[-1]
    assert record["alignment"] is record["coverage"] is record["activity"] is None
    assert list(record["layers"]["test"]["layers"]) == ["u", "z_4", "z_3", "z_2", "z_1"]
    assert record["layers"]["u"]["num_train"] == 1297
    assert list(record["notes"]) == ["prior against aggregate posterior"]


def test_diagnosis_of_a_plain_ladder_and_of_two_levels(runs: Path) -> None:
    text = command("diagnose", runs / "plain", "--num-data", 40)
    assert "pseudoinput\n" not in text
    assert "| z_4 | 1 x 2 x 2 = 4 |" in text
    text = command("diagnose", runs / "hvae", "--num-data", 40)
    for heading in ("prior against aggregate posterior", "coverage", "activity", "layers"):
        assert f"\n{heading}\n\n" in f"\n{text}"
    assert "of z_2 by draws" in text  # under a mixture
    assert "not computed" not in text
    record = json.loads((runs / "hvae" / "diagnosis.json").read_text())[-1]
    assert record["layers"]["u"] is None
    assert record["notes"] == {}
    assert record["activity"]["sites"]["z_2"]["z_dim"] == 3


def test_data_from_elsewhere_are_scored_under_a_ladder(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = from_tensors(images(30, 5), test=(torch.rand(50, 1, 8, 8) < 0.5).float())
    monkeypatch.setattr(diagnosing, "load_outside", lambda *_: noise)
    run = open_run(runs / "dvp")
    wanted = Wanted(("noise",), num_data=30, num_samples=2, num_particles=5)
    found = diagnose(run, wanted, progress=False)
    report = found.ood["noise"]
    assert {"elbo", "log_prob", "kl", "entropy"} <= set(report.detectors)
    assert report.inside.log_prob is not None
    assert float((report.inside.log_prob - report.inside.elbo).mean()) > 0
    assert "the chain of 100 steps" in found.notes["scores of a diffusion"]
    assert "inside against noise" in found.to_text()
    assert len(json.loads(json.dumps(found.to_dict()))["scores"]["noise"]["per_datum"]["elbo"]) == 30


def test_a_density_that_is_estimated_is_not_compared(runs: Path) -> None:
    target = diagnosing.Exact(lambda x: x.flatten(1).sum(-1))
    wanted = Wanted(num_data=40, num_samples=2)
    found = diagnose(open_run(runs / "dvp"), wanted, target=target, progress=False)
    assert found.agreement is None
    assert "only estimated" in found.notes["log p(z) against the density"]
    found = diagnose(open_run(runs / "plain"), wanted, target=target, progress=False)
    assert found.agreement is not None
    assert "log p(z) against the density" not in found.notes
