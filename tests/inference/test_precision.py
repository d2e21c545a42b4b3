"""Networks in bfloat16: which, that densities never are, and that training goes where it went."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pvae.data import Data, load
from pvae.experiments import SpecError, load_spec
from pvae.guides import FiveGuide, FlowGuide, FullCovarianceGuide, NormalGuide
from pvae.inference import ELBO, Run, Trainer, fit
from pvae.inference.engine import EagerEngine, GraphEngine
from pvae.inference.precision import LowPrecision, Networks
from pvae.inference.program import SiteRecorder, program_state
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE, ConditionalVAE
from pvae.nn import (
    ConvDecoder,
    ConvEncoder,
    DCTPseudoinput,
    LabelEmbedding,
    LabelSpace,
    LadderSpec,
    MLPDecoder,
    MLPEncoder,
    PseudoinputPosterior,
    UNetDenoiser,
)
from pvae.priors import ConditionalFlowPrior, CouplingFlow, DiffusionPrior, StandardNormal, VampPrior

from ..ladders import jolted, ladder
from .programs import LinearGuide, LinearModel

SHAPE = (1, 8, 8)
Pair = tuple[Any, Any]
# (Attention is none of them: its kernels choose how they add up.)
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::convolution")


@pytest.fixture(autouse=True)
def _no_validation() -> Iterator[None]:
    with pyro.validation_enabled(False):
        yield


def dense() -> Pair:
    encoder = MLPEncoder(SHAPE, 3, (32,))
    return VAE(StandardNormal(3), MLPDecoder(3, SHAPE, (32,)), Bernoulli()), NormalGuide(encoder)


def gated_vamp() -> Pair:
    encoder = MLPEncoder(SHAPE, 3, (32,), gated=True)
    prior = VampPrior(encoder, torch.rand(4, *SHAPE))
    return VAE(prior, MLPDecoder(3, SHAPE, (32,), gated=True), Bernoulli()), FullCovarianceGuide(encoder)


def convolutional() -> Pair:
    decoder = ConvDecoder(3, SHAPE, (8, 8), 16)
    encoder = ConvEncoder(SHAPE, 3, (8, 8), 16)
    return VAE(StandardNormal(3), decoder, Normal("learned", 0.4)), FlowGuide(encoder, 2, 8)


def conditional() -> Pair:
    def labels() -> LabelEmbedding:
        return LabelEmbedding(LabelSpace("class", 3), 4)

    prior = ConditionalFlowPrior(3, labels(), CouplingFlow(3, 2, 4, 8))
    decoder, encoder = MLPDecoder(3, SHAPE, (32,), labels=labels()), MLPEncoder(SHAPE, 3, labels=labels())
    return ConditionalVAE(prior, decoder, Bernoulli()), NormalGuide(encoder)


def diffused() -> Pair:
    spec = LadderSpec(SHAPE, scales=((4, 1), (2, 1)), channels=4)
    return ladder(spec, u=2, prior=DiffusionPrior(UNetDenoiser((1, 2, 2), channels=8, blocks=1), (1, 2, 2)))


def five() -> Pair:
    encoder, decoder = MLPEncoder(SHAPE, 3, (32,), "silu"), MLPDecoder(3, SHAPE, (32,), "silu")
    likelihood = Normal("learned", 0.4)
    return VAE(StandardNormal(3), decoder, likelihood), FiveGuide(encoder, decoder, likelihood)


PAIRS = [dense, gated_vamp, convolutional, conditional, diffused, five]


def built(pair: Any) -> Pair:
    torch.manual_seed(0)
    programs = pair()
    jolted(*programs, size=0.05)
    return programs


def batch(pair: Any, rows: int = 32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(rows, *SHAPE, generator=generator) < 0.3).float()
    return (x, torch.arange(rows) % 3) if pair is conditional else (x,)


def gradients(engine: Any, programs: Pair, args: tuple[Tensor, ...]) -> tuple[Tensor, list[Any]]:
    torch.manual_seed(4)
    losses = engine(args, torch.tensor(0.7))
    parameters = [p for program in programs for p in program.parameters()]
    return losses, [None if p.grad is None else p.grad.clone() for p in parameters]


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("pair", PAIRS)
def test_loss_and_gradients_are_float32_and_near_those_of_float32(pair: Any) -> None:
    """The depth of a ladder adds the rounding of its layers up; a sign or a wrong network would be more."""
    programs, args = built(pair), batch(pair)
    wanted, reference = gradients(EagerEngine(ELBO(), *programs), programs, args)
    ours, found = gradients(EagerEngine(LowPrecision(ELBO(), *programs), *programs), programs, args)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, wanted)
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-2, atol=0)
    assert [g is None for g in found] == [g is None for g in reference]
    assert {g.dtype for g in found if g is not None} == {torch.float32}
    tolerance = 0.1 if pair is diffused else 0.03
    assert (flat(found) - flat(reference)).norm() < tolerance * flat(reference).norm()


@pytest.mark.parametrize("kind", ["elbo", "mean_field", "iwae", "dreg"])
def test_every_density_and_every_value_is_float32(kind: Any) -> None:
    """Seen through objectives that hold the programs' densities, with particles and parameters exchanged."""
    programs, found = (LinearModel(factor=0.1), LinearGuide()), list[torch.dtype]()

    class Seeing(ELBO):
        def terms(self, *args: Any, **kwargs: Any) -> Any:
            with SiteRecorder() as recorder:
                programs[0](*args[2:])
            sites = recorder.sites.values()
            found.extend(tensor.dtype for site in sites for tensor in (site.value, site.log_prob()))
            terms = super().terms(*args, **kwargs)
            found.extend(t.dtype for t in (terms.loss, terms.log_x, *terms.ratios, *terms.parts.values()))
            return terms

    objective = LowPrecision(Seeing(kind, 3), *programs)
    assert (objective.kind, objective.num_particles) == (kind, 3)
    x = torch.randn(7, 5)
    torch.manual_seed(0)
    loss = objective.terms(*programs, x).loss
    assert set(found) == {torch.float32}
    torch.manual_seed(0)
    assert loss.item() == pytest.approx(Seeing(kind, 3).terms(*programs, x).loss.item(), rel=2e-2)


@pytest.mark.parametrize("pair", [dense, convolutional, diffused, five])
def test_a_graph_holds_the_casts(pair: Any) -> None:
    """The forward and backward pass that is traced is the one under autocast, to the bit."""
    programs, args = built(pair), batch(pair)
    objective = LowPrecision(ELBO(), *programs)
    eager, graph = EagerEngine(objective, *programs), GraphEngine(objective, *programs, compile=False)
    for _ in range(2):  # traced, then replayed
        wanted, ours = gradients(eager, programs, args), gradients(graph, programs, args)
        torch.testing.assert_close(ours[0], wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flat(ours[1]), flat(wanted[1]), rtol=1e-3, atol=1e-4)


class Products(TorchDispatchMode):
    """Notes the types that matrices are multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in _PRODUCTS:
            self.types.add(out.dtype)
        return out


def products(run: Any) -> set[torch.dtype]:
    with torch.no_grad(), Products() as seen:
        run()
    return seen.types


LOW, FULL = {torch.bfloat16}, {torch.float32}


@pytest.mark.parametrize(
    ("pair", "of"),
    [
        (dense, lambda model, guide, x: guide(x)),
        (dense, lambda model, guide, x: model(x)),
        (conditional, lambda model, guide, x: guide(x, torch.zeros(len(x), dtype=torch.int64))),
        (convolutional, lambda model, guide, x: model(x)),
        (diffused, lambda model, guide, x: model.prior().log_prob(torch.randn(len(x), 1, 2, 2))),
        (diffused, lambda model, guide, x: guide.bottom_up(x)),
        (five, lambda model, guide, x: model(x)),
        (gated_vamp, lambda model, guide, x: model.prior()),
    ],
)
def test_networks_are_in_bfloat16(pair: Any, of: Any) -> None:
    model, guide = built(pair)
    (x, *_) = batch(pair)
    assert products(lambda: of(model, guide, x)) == FULL
    with Networks(model, guide):
        assert products(lambda: of(model, guide, x)) == LOW
    assert products(lambda: of(model, guide, x)) == FULL


def test_what_is_mathematics_stays_in_float32_to_the_bit() -> None:
    """A flow, r(u | x) and its way back, and all of a guide made of Jacobians, decoder's included."""
    z, x = torch.randn(7, 3), torch.rand(7, *SHAPE)
    flow_model, flow_guide = built(conditional)
    ladder_model, ladder_guide = built(diffused)
    five_model, five_guide = built(five)

    def flow() -> Tensor:
        transform = flow_model.prior.flow.condition(torch.ones(7, 4))
        return torch.cat([transform(z), transform.log_abs_det_jacobian(z, transform(z)).unsqueeze(1)], 1)

    def u() -> Tensor:
        return ladder_guide.posterior_u(x).log_prob(torch.zeros(7, 1, 2, 2))

    def back() -> Tensor:
        return ladder_model.pseudoinput.context(torch.ones(7, 1, 2, 2))

    def five_draw() -> Tensor:
        torch.manual_seed(2)
        with SiteRecorder() as recorder:
            draw = five_guide(x)
        return torch.cat([draw, recorder.sites["z"].bare_log_prob.unsqueeze(1)], 1)

    for programs, of in (
        ((flow_model, flow_guide), flow),
        ((ladder_model, ladder_guide), u),
        ((ladder_model, ladder_guide), back),
        ((five_model, five_guide), five_draw),
    ):
        with torch.enable_grad():
            wanted = of()
            with Networks(*programs):
                assert torch.equal(of(), wanted)
    matrix = DCTPseudoinput(SHAPE, 3, torch.ones(1, 3, 3))
    with Networks(PseudoinputPosterior(matrix), nn.ModuleList([matrix])):
        assert products(lambda: matrix(x)) == FULL


def test_a_scale_is_made_of_its_logarithm_in_float32() -> None:
    """In bfloat16 the squeezing of a log-variance at range 20 would be off by 6 per cent of a scale."""
    model, guide = built(dense)
    (x, *_) = batch(dense)
    with Networks(model, guide):
        loc, scale = guide.encoder(x)
        loc_and_log_var = guide.encoder.head(guide.encoder.features(x))
    assert torch.equal(loc, loc.bfloat16().float())  # what a network hands out
    assert not torch.equal(scale, scale.bfloat16().float())
    log_var = loc_and_log_var[..., 3:].detach().double().numpy()
    squeezed = 6.0 - np.logaddexp(0.0, 20.0 - np.logaddexp(0.0, log_var + 14.0))
    np.testing.assert_allclose(scale.detach().numpy(), np.exp(0.5 * squeezed), rtol=1e-5)


def test_layers_of_ones_own_are_lowered_one_by_one() -> None:
    """Programs that know nothing of this library; what is no layer of torch's stays."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            self.seen: list[torch.dtype] = []

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            self.seen += [h.dtype, (h @ h.T).dtype]
            return self.second(h)

    own = Own()
    with Networks(own):
        assert own(torch.randn(3, 4)).dtype == torch.float32
        assert products(lambda: own(torch.randn(3, 4))) == LOW | FULL
    assert set(own.seen) == FULL


def test_nothing_is_left_behind_also_after_an_error() -> None:
    model, guide = built(diffused)
    before = {module: dict(module.__dict__) for module in (*model.modules(), *guide.modules())}
    with pytest.raises(RuntimeError), Networks(model, guide):
        model.top_down.read(torch.zeros(2, 1, 8, 8))  # other channels
    assert not torch.is_autocast_enabled("cpu")
    assert all(module.__dict__.keys() == kept.keys() for module, kept in before.items())
    with Networks(model, guide):
        assert products(lambda: guide.bottom_up(torch.rand(2, *SHAPE))) == LOW


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def trained(data: Data, precision: Any, **settings: Any) -> Run:
    torch.manual_seed(0)
    model = VAE(StandardNormal(4), MLPDecoder(4, data.x_shape, (64,)), Bernoulli())
    guide = NormalGuide(MLPEncoder(data.x_shape, 4, (64,)))
    options: dict[str, Any] = {"epochs": 6, "batch_size": 100, "lr": 4e-3, "progress": False}
    return fit(model, guide, data, precision=precision, **{**options, **settings})


def test_training_in_bfloat16_reaches_the_bound_of_float32_and_validates_in_float32(digits: Data) -> None:
    full, low = trained(digits, "float32"), trained(digits, "bf16")
    assert low.notes == []
    assert full.history[-1]["valid_loss"] < full.history[0]["valid_loss"] - 3
    assert low.history[-1]["loss"] != full.history[-1]["loss"]
    for name in ("loss", "valid_loss"):
        assert low.history[-1][name] == pytest.approx(full.history[-1][name], rel=1e-2)
    torch.manual_seed(20_140_501)
    bound = ELBO().terms(low.model, low.guide, digits.valid.x).bound
    assert low.history[-1]["valid_loss"] == pytest.approx(-bound.mean().item(), rel=1e-5)


def test_the_graph_engine_trains_in_bfloat16_as_the_eager_one(digits: Data) -> None:
    options: dict[str, Any] = {"steps": 20, "epochs": None, "log_every": 5}
    eager = trained(digits, "bf16", **options)
    graph = trained(digits, "bf16", engine="graph", compile=False, **options)
    for ours, theirs in zip(graph.history, eager.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_compiled_graph_trains_in_bfloat16(digits: Data) -> None:
    run = trained(digits, "bf16", engine="graph")
    assert run.history[-1]["loss"] == pytest.approx(trained(digits, "bf16").history[-1]["loss"], rel=2e-2)


class Stubborn(nn.Linear):
    """A layer that has no product in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        if h.dtype != torch.float32:
            raise RuntimeError('"stubborn" not implemented for BFloat16.\nand more')
        return h


def stubborn() -> tuple[LinearModel, LinearGuide]:
    torch.manual_seed(0)
    model, guide = LinearModel(), LinearGuide()
    model.decoder = Stubborn(3, 5)
    return model, guide


def test_programs_that_do_not_run_in_bfloat16_are_trained_in_float32_and_it_is_said() -> None:
    x = torch.randn(60, 5)
    states = []
    for precision in ("bf16", "float32"):
        run = fit(*stubborn(), x, epochs=2, batch_size=20, progress=False, precision=precision)
        states.append(program_state(run.model, run.guide))
        reason = '("stubborn" not implemented for BFloat16)'
        said = f"precision 'bf16' cannot run these programs {reason}: 'float32' in its place"
        assert run.notes == ([said] if precision == "bf16" else [])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_trying_bfloat16_draws_nothing_from_the_run_and_moves_no_statistics() -> None:
    """The first loss is that of a trainer which never tried."""
    losses = []
    for check in (False, True):
        torch.manual_seed(0)
        model, guide = LinearModel(), LinearGuide()
        guide.encoder = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6))  # type: ignore[assignment]
        trainer = Trainer(model, guide, total_steps=1, precision="bf16")
        split = load("digits").train[:20]
        batches = [Batchlike.of(split, index) for index in range(2)]
        if check:
            trainer.check(batches[0])
        with trainer.generator():
            trainer.step(batches[1])
        losses.append(trainer.read_losses())
        assert dict(guide.named_buffers())["encoder.0.num_batches_tracked"] == 1
    assert losses[0] == losses[1]


class Batchlike:
    """Batches of five numbers."""

    @staticmethod
    def of(split: Any, seed: int) -> Any:
        batch = split.sample(torch.arange(20))
        x = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
        return batch._replace(x=x, y=None)


def test_a_spec_names_the_precision() -> None:
    assert load_spec("vae").fit.arguments()["precision"] == "float32"
    assert load_spec("vae", ["fit.precision=bf16"]).fit.arguments()["precision"] == "bf16"
    with pytest.raises(SpecError, match=r"fit.precision must be .*'float32' or 'bf16'.*, got 'fp16'"):
        load_spec("vae", ["fit.precision=fp16"])


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp16", "precision must be 'float32' or 'bf16', got 'fp16'"),
        ("bf16", "precision 'bf16' needs programs in torch.float32, got torch.float64"),
    ],
)
def test_other_precisions_are_refused(precision: Any, message: str) -> None:
    model, guide = (program.double() for program in (LinearModel(), LinearGuide()))
    with pytest.raises(ValueError, match=message):
        Trainer(model, guide, total_steps=1, precision=precision)
    Trainer(model, guide, total_steps=1)
