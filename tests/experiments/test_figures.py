"""Pictures: right pixels in the grid, PNGs that show something, no trace on matplotlib or torch."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvae.data import Data
from pvae.experiments import Program, figures
from pvae.experiments.spec import parse

ROWS = [
    {"step": step, "loss": 30 + 100 / step, "reconstruction": 25 + 90 / step, "kl": 5.0, "valid_loss": 31.0}
    for step in range(1, 60)
]


def _program(*overrides: str) -> tuple[Program, Data]:
    small = ["z_dim=2", "encoder.hidden=[8]", "decoder.hidden=[8]"]
    spec = parse("[data]\nname = 'digits'\n[fit]\nsteps = 1\n", [*small, *overrides])
    data = spec.load_data()
    return spec.build(data), data


def _pixels(path: Path) -> Any:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)


def test_loss_curves(tmp_path: Path) -> None:
    pixels = _pixels(figures.loss_curves(ROWS, tmp_path / "new" / "losses.png", "a title"))
    assert pixels.shape[1] > pixels.shape[0] > 300
    for colour in ((0x2F, 0x6F, 0xAB), (0xD9, 0x82, 0x2B), (0x3A, 0x9A, 0x6B)):
        assert (np.abs(pixels[..., :3] * 255 - colour).max(-1) < 3).sum() > 100
    assert (pixels[..., :3] > 0.99).all(-1).mean() > 0.7  # light


def test_loss_curves_of_one_row(tmp_path: Path) -> None:
    assert _pixels(figures.loss_curves(ROWS[:1], tmp_path / "losses.png")).std() > 0.02


def test_loss_curves_need_a_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row with a loss"):
        figures.loss_curves([{"step": 1}], tmp_path / "losses.png")


def test_grid_places_every_image() -> None:
    x = torch.arange(5.0).div(4).reshape(5, 1, 1, 1).expand(5, 1, 3, 2)
    grid = figures._grid(x, columns=3)
    assert grid.shape == (7, 8, 3)  # two rows of 3 and a gap of 1, three columns of 2 and two gaps
    for i in range(5):
        tile = grid[i // 3 * 4 : i // 3 * 4 + 3, i % 3 * 3 : i % 3 * 3 + 2]
        assert (tile == i / 4).all()
    assert (grid[4:, 6:] == 1).all()
    assert (grid[3] == 1).all()


def test_grid_keeps_colours_and_scales_counts() -> None:
    colour = torch.rand(1, 3, 4, 4)
    assert np.allclose(figures._grid(colour, 1), colour[0].permute(1, 2, 0).numpy())
    assert figures._grid(torch.full((1, 1, 2, 2), 16.0), 1).max() == 1
    signed = figures._grid(torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1), 3)
    assert (signed.min(), signed.max()) == (0, 1)


def test_samples_share_their_latents_and_follow_the_seed() -> None:
    program, _ = _program()
    means, draws = figures.draw_samples(program, 300, seed=1)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    # Draws from the same latents: their average over pixels follows the means', which is not so for others.
    again, _ = figures.draw_samples(program, 300, seed=1)
    other, _ = figures.draw_samples(program, 300, seed=2)
    assert torch.equal(means, again)
    assert not torch.equal(means, other)
    assert (draws - means).abs().mean() < (draws - other).abs().mean()


def test_pictures_of_a_program(tmp_path: Path) -> None:
    program, data = _program()
    state = torch.get_rng_state()
    shown = figures.reconstructions(program, data.valid, tmp_path / "r.png", "title")
    drawn = figures.samples(*figures.draw_samples(program, 16), tmp_path / "s.png", "title")
    assert torch.equal(state, torch.get_rng_state())
    assert program.model.training
    for path in (shown, drawn):
        pixels = _pixels(path)
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique((pixels[..., 0] * 255).astype(int))) > 20
    assert "matplotlib.pyplot" not in sys.modules


def test_reconstructions_show_the_data(tmp_path: Path) -> None:
    program, data = _program()
    both = []
    for start in (0, 100):
        path = figures.reconstructions(
            program, data.valid[start : start + 50], tmp_path / f"{start}.png", num=4
        )
        both.append(_pixels(path))
    upper = both[0].shape[0] // 2
    assert np.abs(both[0] - both[1])[:upper].max() > 0.9


def test_points_are_scattered(tmp_path: Path) -> None:
    program, data = _program("data=two_moons", "data.num_train=64", "likelihood=normal", "data.valid=32")
    path = figures.reconstructions(program, data.valid, tmp_path / "r.png", num=32)
    blue = np.abs(_pixels(path)[..., :3] * 255 - (0x2F, 0x6F, 0xAB)).max(-1) < 100
    assert blue.sum() > 200
    assert _pixels(figures.samples(*figures.draw_samples(program, 50), tmp_path / "s.png")).std() > 0.02


def test_reading_metrics_stops_at_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 60, "lo')
    assert figures.read_metrics(path) == ROWS
