"""The ladder's guide: its sites and density, its training, and what evaluation makes of several latents."""

import copy
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pvae
from pvae.evaluation import active_units, latent_scores
from pvae.guides import LadderGuide
from pvae.inference import ELBO, Trainer, fit, registered
from pvae.inference.engine import EagerEngine, GraphEngine
from pvae.inference.objective import Kind
from pvae.inference.program import parameters_of, program_state
from pvae.models import Ladder
from pvae.nn import BottomUp, LadderSpec, MLPDenoiser, PseudoinputPosterior, TopDown
from pvae.priors import DiffusionPrior

from ..inference.test_objective import CountSyncs
from ..ladders import LinearU, jolted, ladder

SPEC = LadderSpec((1, 4, 4), ((2, 1), (1, 2)), channels=3)
SITES = ["u", "z_3", "z_2", "z_1"]


def binary(*shape: int) -> Tensor:
    return (torch.rand(*shape, 1, 4, 4) < 0.5).to(torch.get_default_dtype())


def diffusing(size: float = 0.2, spec: LadderSpec = SPEC) -> tuple[Ladder, LadderGuide]:
    """A ladder under a diffusion prior."""
    torch.manual_seed(0)
    prior = DiffusionPrior(MLPDenoiser((1, 2, 2), 8, 1), (1, 2, 2), gamma_min=-6.0, num_steps=4)
    model, guide = ladder(spec, u=2, prior=prior)
    jolted(model, guide, size=size)
    return model, guide


@pytest.mark.parametrize("u", [None, 2])
@pytest.mark.parametrize("aggregate", [True, False])
def test_sites_are_the_models_in_its_order_for_any_number_of_particles(
    float64: None, u: int | None, aggregate: bool
) -> None:
    model, guide = ladder(SPEC, u=u, aggregate=aggregate)
    jolted(model, guide)
    x = binary(5)
    with pyro.plate("particles", 7, dim=-2):
        q = poutine.trace(guide).get_trace(x)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
    q.compute_log_prob()
    p.compute_log_prob()
    sites = SITES if u else SITES[1:]
    assert [n for n in q.nodes if n[0] in "uz"] == [n for n in p.nodes if n[0] in "uz"] == sites
    for name in sites:
        shape = (1, 2, 2) if name == "u" else SPEC.z_shapes[name]
        assert q.nodes[name]["value"].shape == (7, 5, *shape)
        assert q.nodes[name]["fn"].has_rsample
        for trace in (q, p):
            assert trace.nodes[name]["log_prob"].shape == (7, 5)
            plates = {f.name for f in trace.nodes[name]["cond_indep_stack"]}
            assert plates == {"data", "particles"}
    assert p.nodes["x"]["log_prob"].shape == (7, 5)
    # One particle of one datum by itself.
    drawn = {name: q.nodes[name]["value"][3, 4:] for name in sites}
    alone = poutine.trace(poutine.condition(guide, drawn)).get_trace(x[4:])
    for name in sites:
        node = alone.nodes[name]
        torch.testing.assert_close(node["fn"].log_prob(node["value"])[0], q.nodes[name]["log_prob"][3, 4])


def test_u_reaches_the_posteriors_through_the_way_down_alone(float64: None) -> None:
    model, guide = ladder(SPEC, u=2)
    jolted(model, guide)
    x = binary(3)

    def means(u: Tensor) -> dict[str, Tensor]:
        fixed = poutine.condition(guide, {"u": u, "z_3": torch.zeros(3, 1, 1, 1)})
        trace = poutine.trace(fixed).get_trace(x)
        return {name: trace.nodes[name]["fn"].mean for name in ("z_3", "z_2")}

    one, other = means(torch.zeros(3, 1, 2, 2)), means(torch.ones(3, 1, 2, 2))
    assert torch.equal(one["z_3"], other["z_3"])
    assert not torch.allclose(one["z_2"], other["z_2"])


@pytest.mark.parametrize("u", [None, 2])
@pytest.mark.parametrize("aggregate", [True, False])
@pytest.mark.parametrize("kind", ["elbo", "mean_field"])
def test_every_parameter_has_a_gradient_and_one_owner(
    float64: None, u: int | None, aggregate: bool, kind: Any
) -> None:
    torch.manual_seed(1)
    model, guide = ladder(SPEC, u=u, aggregate=aggregate)
    jolted(model, guide)
    ours = {id(p) for p in model.parameters()}
    assert ours.isdisjoint(id(p) for p in guide.parameters())
    named = parameters_of(model, guide)
    assert len(named) == len(ours) + len(list(guide.parameters()))
    ELBO(kind).terms(model, guide, binary(6)).loss.backward()
    for name, parameter in named:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_mean_field_and_sampled_ratios_agree_in_expectation_layer_by_layer(float64: None) -> None:
    model, guide = diffusing()
    x = binary(2)
    with torch.no_grad():
        parts: dict[str, list[dict[str, float]]] = {}
        kinds: tuple[Kind, ...] = ("elbo", "mean_field")
        for kind in kinds:
            objective = ELBO(kind, num_particles=300)
            runs = [objective.terms(model, guide, x).parts for _ in range(8)]
            parts[kind] = [{name: value.item() for name, value in run.items()} for run in runs]
    for name in ("kl/z_3", "kl/z_2", "kl/z_1", "kl/u", "kl", "reconstruction"):
        sampled, closed = (np.array([run[name] for run in parts[kind]]) for kind in ("elbo", "mean_field"))
        error = np.hypot(sampled.std(ddof=1), closed.std(ddof=1)) / np.sqrt(8)
        assert abs(sampled.mean() - closed.mean()) < 5 * error, name
        if name.startswith("kl/z"):
            assert closed.min() > 0
    # The topmost KL given u has no noise but that of u; the sampled one has that of z too.
    assert np.std([run["kl/z_1"] for run in parts["mean_field"]]) < np.std(
        [run["kl/z_1"] for run in parts["elbo"]]
    )


@pytest.mark.parametrize(("kind", "reference"), [("elbo", Trace_ELBO), ("mean_field", TraceMeanField_ELBO)])
def test_objectives_equal_pyros_in_value_and_gradient(float64: None, kind: Any, reference: Any) -> None:
    model, guide = ladder(SPEC, u=2)
    jolted(model, guide)
    x = binary(5)
    found = []
    for objective in (ELBO(kind, 3), reference(3, vectorize_particles=True, max_plate_nesting=1)):
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.grad = None
        torch.manual_seed(2)
        loss = objective.differentiable_loss(model, guide, x)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in (*model.parameters(), *guide.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_it_trains_under_stock_pyro_with_every_parameter_registered_once() -> None:
    model, guide = diffusing()
    x = binary(20)
    svi = SVI(
        registered(model, "model"),
        registered(guide, "guide"),
        pyro.optim.Adam({"lr": 0.02}),
        TraceMeanField_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    )
    losses = [svi.step(x) for _ in range(15)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert len(pyro.get_param_store()) == len(parameters_of(model, guide))
    draws = Predictive(model, guide=guide, num_samples=6, parallel=True)(x)
    assert draws["z_1"].shape == (6, 20, 1, 2, 2)


def test_dreg_is_refused_as_the_guide_uses_the_models_network(float64: None) -> None:
    model, guide = ladder(SPEC)
    with pytest.raises(ValueError, match="density of LadderGuide depends on the model's"):
        ELBO("dreg", 2).terms(model, guide, binary(3))
    assert ELBO("iwae", 2).terms(model, guide, binary(3)).loss.isfinite()


def test_the_graph_engine_gives_the_losses_and_gradients_of_the_programs(float64: None) -> None:
    model, guide = diffusing()
    programs, objective = (model, guide), ELBO("mean_field", 2)
    parameters = [*model.parameters(), *guide.parameters()]
    found, x = [], binary(4)
    with pyro.validation_enabled(False):
        for engine in (
            EagerEngine(objective, *programs),
            GraphEngine(objective, *programs, compile=False),
        ):
            torch.manual_seed(4)
            losses = engine((x,), torch.tensor(0.7))
            found.append([losses, *(p.grad.clone() for p in parameters if p.grad is not None)])
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-9, atol=1e-11)


def test_a_step_never_waits_for_the_device() -> None:
    model, guide = diffusing()
    with pyro.validation_enabled(False), CountSyncs() as syncs:
        ELBO("mean_field", 2).terms(model, guide, binary(4)).loss.backward()
    assert syncs.count == 0


@pytest.mark.parametrize("settings", [{"ema": 0.9}, {"engine": "graph", "compile": False}])
def test_interrupted_and_resumed_training_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    x = binary(60)
    options: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 15,
        "objective": "mean_field",
        "optimizer": "adamax",
        "schedule": "cosine",
        "grad_clip": 2e3,
        "log_every": 3,
        "progress": False,
        **settings,
    }
    spec = LadderSpec((1, 4, 4), ((2, 1), (1, 1)), channels=2)
    whole_programs = diffusing(spec=spec)
    whole = fit(*whole_programs, x, out=tmp_path / "whole", **options)
    row = whole.history[-1]
    assert row["kl"] == pytest.approx(sum(row[f"kl/{name}"] for name in ("u", "z_2", "z_1")))
    step = Trainer.step

    def interrupted(self: Trainer, batch: Any) -> None:
        if self.step_count == 4:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(*diffusing(spec=spec), x, out=tmp_path / "cut", **options)
    monkeypatch.undo()
    fresh = diffusing(0.5, spec)
    resumed = fit(*fresh, x, out=tmp_path / "cut", resume=True, **options)
    wanted, ours = program_state(*whole_programs), program_state(*fresh)
    assert wanted.keys() == ours.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert resumed.history == whole.history


def test_evaluation_takes_several_latents() -> None:
    model, guide = diffusing()
    x = binary(12)
    activity = active_units(model, guide, x, num_draws=4)
    assert len(activity.variance) == SPEC.z_dim + 4
    assert {name: len(one.variance) for name, one in activity.by_site.items()} == {
        "u": 4,
        "z_3": 1,
        "z_2": 1,
        "z_1": 4,
    }
    assert sum(one.count for one in activity.by_site.values()) == activity.count
    assert torch.equal(activity.by_site["z_1"].variance, activity.variance[6:])
    assert activity.to_dict()["sites"]["u"]["active_units"] == activity.by_site["u"].count
    assert "z_1 " in str(activity)
    scores = latent_scores(model, guide, x, num_samples=64, progress=False)
    assert scores.elbo.isfinite().all()
    estimate = pvae.log_likelihood(model, guide, x, num_particles=64, progress=False)
    assert estimate.mean > estimate.elbo
    # Each is a mean over 64 draws of 12 data, with a standard error of about one nat.
    assert estimate.elbo == pytest.approx(scores.elbo.mean().item(), abs=6.0)


def test_parts_that_do_not_fit_are_refused() -> None:
    bottom_up, top_down = BottomUp(SPEC, stem="full"), TopDown(SPEC, SPEC.x_shape)
    r = PseudoinputPosterior(LinearU(SPEC.x_shape, 2))
    with pytest.raises(ValueError, match="bottom_up and top_down must be of one ladder"):
        LadderGuide(BottomUp(LadderSpec((1, 4, 4), ((2, 2),), channels=3), stem="full"), top_down, r)
    with pytest.raises(ValueError, match="posterior_u must be given where the model's priors see"):
        LadderGuide(bottom_up, top_down)
    with pytest.raises(ValueError, match="posterior_u must be None where the model's priors see no"):
        LadderGuide(bottom_up, TopDown(SPEC, SPEC.x_shape, context=False), r)


def test_the_network_of_the_model_is_held_and_not_owned() -> None:
    model, guide = ladder(SPEC)
    assert not any(isinstance(module, TopDown) for module in guide.modules())
    assert not any(name.startswith("_model") for name, _ in guide.named_parameters())
    assert isinstance(guide, nn.Module)
    other_model, other_guide = ladder(SPEC)
    other_model.load_state_dict(model.state_dict())
    other_guide.load_state_dict(guide.state_dict())
    x = binary(3)
    found = []
    for program in (guide, other_guide):
        torch.manual_seed(0)
        found.append(poutine.trace(program).get_trace(x).nodes["z_1"]["value"])
    assert torch.equal(*found)


@pytest.mark.parametrize("u", [1, None])
@pytest.mark.parametrize("aggregate", [True, False])
def test_the_way_down_is_gone_once_for_both(
    u: int | None, aggregate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradients are those of a model that goes its own way."""
    torch.manual_seed(0)
    model, guide = ladder(SPEC, u=u, aggregate=aggregate)
    jolted(model, guide)
    x = torch.rand(3, *SPEC.x_shape).round()
    passes: list[int] = []
    hook = model.top_down.priors[1].register_forward_hook(lambda *_: passes.append(1))

    def step() -> dict[str, Tensor]:
        torch.manual_seed(1)
        for program in (model, guide):
            program.zero_grad()
        passes.clear()
        loss = ELBO("mean_field").differentiable_loss(model, guide, x)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **found}

    shared = step()
    assert len(passes) == 1
    monkeypatch.setattr(TopDown, "keep", lambda *_: None)
    alone = step()
    assert len(passes) == 2
    hook.remove()
    assert shared.keys() == alone.keys()
    for name, value in shared.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


def test_a_way_down_is_gone_anew_for_other_parameters_or_latents() -> None:
    torch.manual_seed(0)
    model, guide = ladder(SPEC)
    jolted(model, guide)
    x = torch.rand(3, *SPEC.x_shape).round()

    def log_prob(values: dict[str, Tensor]) -> Tensor:
        trace = pyro.poutine.trace(pyro.poutine.condition(model, data=values)).get_trace(x)
        return trace.log_prob_sum().detach()

    def drawn() -> dict[str, Tensor]:
        trace = pyro.poutine.trace(guide).get_trace(x)
        return {name: trace.nodes[name]["value"] for name in SITES}

    values = drawn()
    copy.deepcopy((model, guide))  # which no tensor with a gradient allows
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(log_prob(values), log_prob({name: z.clone() for name, z in values.items()}))
    values = drawn()
    last = SPEC.names[1]
    changed = {**values, last: values[last] + 1}
    assert torch.allclose(log_prob(changed), log_prob({name: z.clone() for name, z in changed.items()}))
