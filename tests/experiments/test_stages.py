"""The first stage of an X-VAE: what it leaves in the program, and that it survives an interruption."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pvae.data import Data, load
from pvae.experiments import Spec, SpecError, load_spec
from pvae.experiments.jobs import train
from pvae.experiments.runs import open_run
from pvae.experiments.spec import parse
from pvae.experiments.stages import FirstStage, install, pretrain
from pvae.nn import WhitenedDecoder, WhitenedEncoder

pytestmark = pytest.mark.usefixtures("undrawn")

SHORT = ["autoencoder.epochs=2", "fit.steps=3", "evaluate.num_particles=4", "evaluate.limit=12"]


@pytest.fixture(scope="module")
def data() -> Data:
    return load("digits", binarize="none", dequantize=True)


def spec_of(*overrides: str) -> Spec:
    return load_spec("x-vae-digits", [*SHORT, *overrides])


@pytest.fixture(scope="module")
def stage(data: Data) -> FirstStage:
    spec = spec_of()
    return pretrain(spec, spec.build(data), data, progress=False)


def built(stage: FirstStage, data: Data, *overrides: str) -> tuple[Spec, tuple[Any, Any]]:
    spec = spec_of(*overrides)
    program = spec.build(data)
    install(stage, spec, program)
    return spec, (program.model, program.guide)


def reconstruction(encoder: Any, decoder: Any, x: Tensor) -> Tensor:
    image: Tensor = decoder(encoder(x)[0])
    return image


@pytest.mark.parametrize("parametrisation", ["raw", "whitened"])
def test_a_warm_start_is_the_autoencoder(stage: FirstStage, data: Data, parametrisation: str) -> None:
    _, (model, guide) = built(
        stage, data, f"model.parametrisation={parametrisation}", "model.warm_start=true"
    )
    x = data.valid[:50].x
    ours = reconstruction(guide.encoder, model.decoder, x)
    torch.testing.assert_close(ours, reconstruction(stage.encoder, stage.decoder, x), rtol=1e-4, atol=1e-4)
    loc, scale = guide.encoder(x)
    torch.testing.assert_close(loc, stage.encoder(x)[0], rtol=1e-4, atol=1e-3)
    # A tenth of the scale of the codes, but for the weights that let it depend on x.
    assert (scale / (0.1 * model.prior.scale)).log().abs().max() < 0.5


def test_a_cold_start_is_the_spec_s_own(stage: FirstStage, data: Data) -> None:
    spec, (model, guide) = built(stage, data, "model.warm_start=false", "prior.variant=diag")
    fresh: Any = spec.build(data)
    for ours, theirs in ((guide, fresh.guide), (model.decoder, fresh.model.decoder)):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name


def test_whitened_networks_get_the_units_of_the_prior(stage: FirstStage, data: Data) -> None:
    _, (model, guide) = built(stage, data, "model.parametrisation=whitened", "model.warm_start=false")
    assert isinstance(guide.encoder, WhitenedEncoder)
    assert isinstance(model.decoder, WhitenedDecoder)
    for net in (guide.encoder, model.decoder):
        assert torch.equal(net.loc, model.prior.loc)
        assert torch.equal(net.scale, model.prior.scale)


def test_a_frozen_decoder_is_not_trained(data: Data, tmp_path: Path) -> None:
    trained = train(spec_of("model.freeze_decoder=true"), tmp_path / "run", progress=False)
    model: Any = trained.run.model
    assert not any(p.requires_grad for p in model.decoder.parameters())
    _, (before, _) = built(
        pretrain(spec_of(), spec_of().build(data), data, progress=False), data, "model.freeze_decoder=true"
    )
    for name, value in model.decoder.state_dict().items():
        assert torch.equal(value, before.decoder.state_dict()[name]), name


def test_the_codes_are_those_of_the_training_data(stage: FirstStage, data: Data) -> None:
    codes = stage.encoder(data.train.x)[0].double()
    torch.testing.assert_close(stage.stats.mean, codes.mean(0), rtol=1e-6, atol=1e-6)
    assert stage.held_out is not None
    torch.testing.assert_close(
        stage.held_out.mean, stage.encoder(data.valid.x)[0].double().mean(0), rtol=1e-6, atol=1e-6
    )


def test_codes_that_moved_are_noted(stage: FirstStage) -> None:
    assert stage.held_out is not None
    assert stage.shift is not None
    gap = (stage.held_out.mean - stage.stats.mean) / stage.stats.std
    ratio = (stage.held_out.std / stage.stats.std).log()
    assert stage.shift.largest == pytest.approx(float(torch.maximum(gap.abs(), ratio.abs()).max()), rel=1e-6)
    assert stage.summary()["codes"] == 1297
    loud, quiet = (replace(stage, shift=replace(stage.shift, largest=size)) for size in (0.3, 0.1))
    assert "by 0.30 standard deviations in one dimension" in loud.notes()[0]
    assert quiet.notes() == []


def test_a_run_is_opened_without_its_first_stage(data: Data, tmp_path: Path) -> None:
    model: Any = train(spec_of(), tmp_path / "run", progress=False).run.model
    opened = open_run(tmp_path / "run")
    z, x = torch.randn(5, 8), data.valid[:5].x
    assert torch.equal(opened.model.prior().log_prob(z), model.prior().log_prob(z))
    assert torch.equal(opened.model.code(x), model.code(x))
    assert (tmp_path / "run" / "autoencoder" / "metrics.jsonl").is_file()
    manifest = opened.folder.read_manifest()
    assert manifest["sigma"] == pytest.approx(float(opened.model.likelihood.sigma))
    assert manifest["autoencoder"]["dead"] == []


def test_interrupted_in_either_stage_and_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(spec_of(), tmp_path / "whole", progress=False)
    from pvae.experiments import jobs, stages

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name, module in (("first", stages), ("second", jobs)):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(module, "install" if module is stages else "fit", stopped)
            with pytest.raises(KeyboardInterrupt):
                train(spec_of(), out, progress=False)
        again = train(spec_of(), out, resume=True, progress=False)
        for ours, theirs in zip(again.run.history, whole.run.history, strict=True):
            assert ours == theirs
        for key, value in whole.run.model.state_dict().items():
            assert torch.equal(value, again.run.model.state_dict()[key]), key


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prior.kind=normal"], r"\[model\] kind = 'x_vae': an X-VAE needs a prior of codes"),
        (["model.warm_start=false", "model.freeze_decoder=true"], "freeze_decoder needs warm_start"),
        (["model.kind=vae"], r"\[prior\] kind = 'codes' is fitted to the codes of an autoencoder"),
    ],
)
def test_parts_that_do_not_fit_are_refused(overrides: list[str], said: str, data: Data) -> None:
    with pytest.raises(SpecError, match=said):
        spec_of(*overrides).build(data)


def test_a_first_stage_belongs_to_an_x_vae() -> None:
    text = '[data]\nname = "digits"\n[fit]\nepochs = 1\n[autoencoder]\nepochs = 2\n'
    with pytest.raises(SpecError, match=r"\[autoencoder\] is the first stage of model.kind = 'x_vae'"):
        parse(text)
    spec = load_spec("x-vae-digits", ["model=vae", "prior=normal"])
    assert spec.autoencoder is None
    assert "[autoencoder]" not in spec.to_toml()
    with pytest.raises(ValueError, match="has no first stage"):
        pretrain(spec, spec.build(load("digits", binarize="none", dequantize=True)), load("digits"))


def test_its_keys_are_checked() -> None:
    with pytest.raises(SpecError, match=r"autoencoder.epochs must be"):
        spec_of("autoencoder.epochs=0")
    with pytest.raises(SpecError, match=r"unknown key autoencoder.epoch"):
        spec_of("autoencoder.epoch=3")
    again = parse(spec_of("autoencoder.code_l2=0.5").to_toml())
    assert again == spec_of("autoencoder.code_l2=0.5")
