"""Pictures: right pixels in the grid, PNGs that show something, no trace on matplotlib or torch."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pvae import canvas
from pvae.data import Data, from_tensors
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


def test_grid_keeps_colours() -> None:
    colour = torch.rand(1, 3, 4, 4)
    assert np.allclose(figures._grid(colour, 1), colour[0].permute(1, 2, 0).numpy())


def test_grid_clips_and_never_rescales() -> None:
    x = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.3]).reshape(1, 1, 1, 5)
    assert figures._grid(x, 1)[0, :, 0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    counts = torch.tensor([-1.0, 0.0, 4.0, 16.0, 20.0]).reshape(1, 1, 1, 5)
    assert figures._grid(counts, 1, (0.0, 16.0))[0, :, 0].tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    signed = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5)
    assert figures._grid(signed, 1, (-1.0, 1.0))[0, :, 0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


_RANGES: list[tuple[Tensor, dict[str, Any], tuple[float, float]]] = [
    (torch.tensor([0.0, 1.0, 1.0]), {}, (0, 1)),
    (torch.tensor([0.25, 0.5, 0.6]), {}, (0, 1)),
    (torch.tensor([1, 5, 9], dtype=torch.uint8), {"levels": 17}, (0, 1)),
    (torch.tensor([1, 5, 9], dtype=torch.uint8), {"levels": 17, "scale": "count"}, (0, 16)),
    (torch.tensor([3, 5, 9]), {}, (0, 9)),
    (torch.tensor([-3.0, 2.5, 0.0]), {}, (-3, 2.5)),
    (torch.tensor([2.0, 2.0, 2.0]), {}, (2, 3)),
]


@pytest.mark.parametrize(("values", "options", "expected"), _RANGES)
def test_black_and_white_stand_for_the_bounds_of_the_data(
    values: Tensor, options: dict[str, Any], expected: tuple[float, float]
) -> None:
    data = from_tensors(values.reshape(3, 1, 1, 1), **options)
    assert figures.value_range(data.train) == expected


def test_a_mean_outside_the_unit_interval_dims_no_other(tmp_path: Path) -> None:
    x = torch.full((4, 1, 4, 4), 0.5)
    beyond = x.clone()
    beyond[0, 0, 0, 0] = 3.0
    inside = x.clone()
    inside[0, 0, 0, 0] = 1.0
    drawn = [_pixels(figures.samples(each, each, tmp_path / "s.png")) for each in (beyond, inside)]
    assert np.array_equal(*drawn)


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


@pytest.mark.parametrize(("name", "coordinates"), [("saddle", 3), ("two_moons", 2), ("ppca", 2)])
def test_points_stand_on_the_same_axes_and_are_joined_to_their_means(
    name: str, coordinates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def kept(figure: Any, path: Path, title: str) -> Path:
        drawn.append(figure)
        return path

    monkeypatch.setattr(canvas, "save", kept)
    size = ["data.num_train=64", "data.num_test=8", "data.valid=400"]
    program, data = _program(f"data={name}", *size, "likelihood=normal")
    figures.reconstructions(program, data.valid, tmp_path / "r.png")
    figures.samples(*figures.draw_samples(program, 50), tmp_path / "s.png")
    for figure, joined in zip(drawn, (300, 0), strict=True):
        left, right = figure.axes
        assert left.name == right.name == ("3d" if coordinates == 3 else "rectilinear")
        for axis in "xyz"[:coordinates]:
            low, high = getattr(left, f"get_{axis}lim")()
            assert (low, high) == getattr(right, f"get_{axis}lim")()
        assert len(right.lines) == joined
        assert not left.lines
    # Each line leads from a datum to a point of the other panel.
    x = data.valid[torch.linspace(0, 399, 300, dtype=torch.float64).long()].x[:, :coordinates].numpy()
    ends = [line.get_data_3d() if coordinates == 3 else line.get_data() for line in drawn[0].axes[1].lines]
    np.testing.assert_allclose(np.stack(ends)[:, :, 0], x, rtol=1e-6)
    points = drawn[0].axes[1].collections[0]
    means = np.stack(points._offsets3d, -1) if coordinates == 3 else points.get_offsets()
    np.testing.assert_allclose(np.stack(ends)[:, :, 1], means, rtol=1e-6)


def test_labels_stand_left_of_their_rows(tmp_path: Path) -> None:
    levels = (0.2, 0.6, 0.8)
    rows = [torch.full((5, 1, 8, 8), level) for level in levels]
    drawn = []
    for labels in (("00", "33", "88"), ("88", "33", "00")):
        means = dict(zip(labels, rows, strict=True))
        path = figures.labelled_grid(means, tmp_path / "l.png", "title", draws=means)
        drawn.append(_pixels(path)[..., :3])
    tiles = [(np.abs(drawn[0] - level).max(-1) < 0.01) for level in levels]
    left = min(np.nonzero(tile)[1].min() for tile in tiles)
    changed = (np.abs(drawn[0] - drawn[1]).max(-1) > 0.1).nonzero()
    assert changed[1].max() < left
    # What changed is the first and the last label, each beside the tiles of its own row.
    for tile, expected in zip(tiles, (True, False, True), strict=True):
        inside = tile[:, left:].any(1).nonzero()[0]
        assert ((changed[0] >= inside.min()) & (changed[0] <= inside.max())).any() == expected
    assert [tile.any(1).nonzero()[0].min() for tile in tiles] == sorted(
        tile.any(1).nonzero()[0].min() for tile in tiles
    )


def test_labelled_rows_stand_beside_their_draws(tmp_path: Path) -> None:
    means = {"a": torch.full((3, 1, 4, 4), 0.3), "b": torch.full((3, 1, 4, 4), 0.3)}
    draws = {"a": torch.full((3, 1, 4, 4), 0.7), "b": torch.full((3, 1, 4, 4), 0.7)}
    pixels = _pixels(figures.labelled_grid(means, tmp_path / "l.png", draws=draws))[..., :3]
    dark, light = ((np.abs(pixels - level).max(-1) < 0.01).nonzero() for level in (0.3, 0.7))
    assert dark[1].max() < light[1].min()
    assert set(dark[0]) == set(light[0])


def test_a_labelled_grid_needs_equal_rows(tmp_path: Path) -> None:
    rows = {"a": torch.zeros(3, 1, 4, 4), "b": torch.zeros(2, 1, 4, 4)}
    for given in (rows, {}):
        with pytest.raises(ValueError, match="the same number of images for every label"):
            figures.labelled_grid(given, tmp_path / "l.png", draws=given)


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    rows = {"$a": torch.zeros(2, 1, 4, 4), r"\frac$": torch.zeros(2, 1, 4, 4)}
    points = {name: torch.randn(5, 2) for name in rows}
    assert figures.labelled_grid(rows, tmp_path / "l.png", draws=rows).is_file()
    assert figures.labelled_grid(points, tmp_path / "p.png", draws=points).is_file()


def test_hundreds_of_labels_make_a_picture_that_can_be_opened(tmp_path: Path) -> None:
    rows = {str(label): torch.zeros(1, 1, 2, 2) for label in range(180)}
    assert max(_pixels(figures.labelled_grid(rows, tmp_path / "l.png", draws=rows)).shape) < 10_000


def test_labelled_points_have_a_colour_each_and_a_legend(tmp_path: Path) -> None:
    rows = {name: torch.randn(40, 2) for name in ("upper", "lower")}
    pixels = _pixels(figures.labelled_grid(rows, tmp_path / "p.png", "title", draws=rows))[..., :3] * 255
    for colour in ((0x2F, 0x6F, 0xAB), (0xD9, 0x82, 0x2B)):
        where = (np.abs(pixels - colour).max(-1) < 100).nonzero()[1]
        assert len(where) > 200
        assert where.max() > 0.85 * pixels.shape[1]  # the legend, right of both panels


def test_draws_share_noise_across_labels_and_options() -> None:
    class Shifted(torch.nn.Module):
        def sample(self, n: int, y: Tensor, mean: bool, scale: float = 1.0) -> Tensor:
            z = scale * torch.randn(n, 2) + y[:, None]
            return z if mean else z + torch.randn(n, 2)

    program = Program(Shifted(), torch.nn.Module())
    means, draws = figures.draw_samples(program, 4, 3, torch.zeros(4))
    others, _ = figures.draw_samples(program, 4, 3, torch.ones(4))
    halved, _ = figures.draw_samples(program, 4, 3, torch.zeros(4), scale=0.5)
    assert torch.allclose(others, means + 1)
    assert torch.allclose(halved, means / 2)
    assert not torch.allclose(draws, means)


def test_draws_may_share_a_pseudoinput() -> None:
    class Around(torch.nn.Module):
        def sample_given(self, u: Tensor, n_each: int, mean: bool, temperature: float = 1.0) -> Tensor:
            z = u.unsqueeze(1) + temperature * torch.randn(len(u), n_each, *u.shape[1:])
            return z if mean else z + torch.randn(z.shape)

    program = Program(Around(), torch.nn.Module())
    means, draws = figures.draw_samples(program, 4, 3, u=torch.zeros(1, 2, 2))
    others, _ = figures.draw_samples(program, 4, 3, u=torch.ones(1, 2, 2), temperature=0.5)
    assert means.shape == draws.shape == (4, 1, 2, 2)
    assert torch.allclose(others, means / 2 + 1)
    assert not torch.allclose(draws, means)


def test_what_was_given_stands_beside_what_was_drawn(tmp_path: Path) -> None:
    labels, levels = ("a", "b"), (0.2, 0.4, 0.6, 0.8)
    x, low, mean, draw = (torch.full((n, 1, 8, 8), c) for n, c in zip((1, 1, 5, 5), levels, strict=True))
    given, means, draws = (dict.fromkeys(labels, made) for made in (torch.cat((x, low)), mean, draw))
    pixels = _pixels(figures.given_grid(given, means, draws, tmp_path / "g.png", "title"))[..., :3]
    tiles = [(np.abs(pixels - level).max(-1) < 0.01).nonzero() for level in levels]
    for left, right in itertools.pairwise(tiles):
        assert left[1].max() < right[1].min()
    # Every row goes through all panels, each image in the same size.
    assert max(tile[0].min() for tile in tiles) - min(tile[0].min() for tile in tiles) <= 1
    assert max(tile[0].max() for tile in tiles) - min(tile[0].max() for tile in tiles) <= 1
    assert len(tiles[2][0]) == pytest.approx(5 * len(tiles[0][0]), rel=0.05)


def test_reading_metrics_stops_at_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 60, "lo')
    assert figures.read_metrics(path) == ROWS
