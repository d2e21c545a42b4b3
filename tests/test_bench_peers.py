"""Other libraries train the same model: their losses are ours from the same noise, and all judged alike."""

import copy
import importlib
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

import pvae
from pvae.data import from_tensors, load
from pvae.experiments.bench import format_table, peers, run_bench
from pvae.experiments.bench.peers import CASES, PeerCase, held_out_elbo, peers_of, time_peers, time_to
from pvae.inference import ELBO

CPU = torch.device("cpu")
CASE = PeerCase((16,), z_dim=3, batch_size=100, epochs=2, most=4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small networks, and the data that need no file."""
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    monkeypatch.setitem(CASES, "digits", CASE)


@pytest.fixture
def no_pythae(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.startswith("pythae"):
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)


def _peers(tmp_path: Path, *engines: str) -> dict[str, Any]:
    return dict(peers_of(CASE, load("digits", binarize="static").train, engines, CPU, str(tmp_path)))


def test_a_curve_reaches_a_threshold_between_epochs() -> None:
    seconds, elbos = [2.0, 4.0, 2.0], [-10.0, -6.0, -5.0]
    assert time_to(-10.0, seconds, elbos) == 2.0
    assert time_to(-9.0, seconds, elbos) == 3.0
    assert time_to(-6.0, seconds, elbos) == 6.0
    assert time_to(-5.5, seconds, elbos) == 7.0
    assert time_to(-4.0, seconds, elbos) is None


def test_ours_is_what_fit_does_and_starts_afresh(tmp_path: Path, no_pythae: None) -> None:
    ours = _peers(tmp_path, "eager")["eager"]
    start = {key: value.clone() for key, value in ours.networks.state_dict().items()}
    program = CASE.program((1, 8, 8))
    networks = peers._networks(program)
    networks.load_state_dict(start)
    data = load("digits", binarize="static")
    pvae.fit(*program, data.train, epochs=2, batch_size=100, lr=1e-3, seed=0)
    for _ in range(2):
        ours.begin(start, seed=0)
        assert ours.steps == 12
        for epoch in range(2):
            ours.epoch(epoch)
        for mine, theirs in zip(ours.networks.parameters(), networks.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_pyro_has_the_same_loss_from_the_same_noise(tmp_path: Path, no_pythae: None) -> None:
    theirs, program = _peers(tmp_path)["Pyro"], CASE.program((1, 8, 8))
    peers._networks(program).load_state_dict(theirs.networks.state_dict())
    x = (torch.rand(9, 1, 8, 8) < 0.3).float()
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(theirs._model, theirs._guide, x) / len(x)
    torch.manual_seed(1)
    assert float(ELBO().terms(*program, x).loss.detach()) == pytest.approx(loss, rel=1e-5)


def test_pyro_learns_and_starts_afresh_and_leaves_no_parameters_behind(
    tmp_path: Path, no_pythae: None
) -> None:
    theirs, valid = _peers(tmp_path)["Pyro"], load("digits", binarize="static").valid
    judge = CASE.program((1, 8, 8))
    start = {key: value.clone() for key, value in theirs.networks.state_dict().items()}
    found = []
    for _ in range(2):
        theirs.begin(start, seed=0)
        elbos = []
        for epoch in range(2):
            theirs.epoch(epoch)
            peers._networks(judge).load_state_dict(theirs.networks.state_dict())
            elbos.append(held_out_elbo(judge, valid))
        assert elbos[1] > elbos[0] + 0.5
        found.append(elbos)
    assert found[0] == found[1]
    assert not list(pyro.get_param_store().keys())


def test_the_held_out_elbo_is_that_of_the_objective() -> None:
    program, split = CASE.program((1, 8, 8)), from_tensors((torch.rand(7, 1, 8, 8) < 0.5).float()).train
    state = torch.get_rng_state()
    found = held_out_elbo(program, split)
    assert found == held_out_elbo(copy.deepcopy(program), split)
    assert torch.equal(torch.get_rng_state(), state)
    exact = pvae.log_likelihood(*program, split.x, num_particles=4000, progress=False)
    single = [held_out_elbo(program, split[torch.tensor([i] * 1000)]) for i in range(7)]
    assert sum(single) / 7 == pytest.approx(exact.elbo, abs=0.1)


def test_time_beside_pyro_and_a_peer_that_is_not_installed(no_pythae: None) -> None:
    rows = run_bench(device="cpu", rounds=2, names=("peers",), engines=("eager",), threads=1, out=None)
    assert [(row["ours"], row["yardstick"]) for row in rows] == [
        (what, peer) for peer in ("Pyro", "pythae") for what in ("eager, step", "eager, to an ELBO")
    ]
    step, way, *absent = rows
    assert "digits, batch 100: " in str(step["note"])
    assert "steps a second" in str(step["note"])
    assert "nats, that of eager after 2 epochs" in str(way["note"])
    assert step["ratio"] is not None
    assert {row["ratio"] for row in absent} == {None}
    assert all("pythae is not installed: pip install" in str(row["note"]) for row in absent)
    table = format_table(rows)
    assert table.splitlines()[0].rstrip(" |").endswith("note")
    assert "left out: pythae is not installed" in table


def test_who_does_not_reach_the_elbo_is_left_out(no_pythae: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers._Pyro, "epoch", lambda self, number: None)
    rows = time_peers(CPU, rounds=1, engines=("eager",))
    assert rows[1]["ratio"] is None
    assert str(rows[1]["note"]).endswith("nats in 4 epochs")
    assert "Pyro did not reach -" in str(rows[1]["note"])


def test_pythae_has_the_same_loss_from_the_same_noise_and_learns(tmp_path: Path) -> None:
    pytest.importorskip("pythae", reason="needs pythae, of the extra bench")
    theirs, program = _peers(tmp_path)["pythae"], CASE.program((1, 8, 8))
    networks = peers._networks(program)
    networks.load_state_dict(theirs.networks.state_dict())
    x = (torch.rand(9, 1, 8, 8) < 0.3).float()
    torch.manual_seed(1)
    loss = float(theirs._vae({"data": x}).loss.detach())
    torch.manual_seed(1)
    assert float(ELBO("mean_field").terms(*program, x).loss.detach()) == pytest.approx(loss, rel=1e-5)

    start = {key: value.clone() for key, value in theirs.networks.state_dict().items()}
    valid = load("digits", binarize="static").valid
    before = held_out_elbo(program, valid)
    theirs.begin(start, seed=0)
    assert theirs.steps == len(theirs._trainer.train_loader) == 13
    theirs.epoch(0)
    networks.load_state_dict(theirs.networks.state_dict())
    assert held_out_elbo(program, valid) > before + 0.5
