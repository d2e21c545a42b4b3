"""A ladder under a diffusion prior of pseudoinputs as one writes it without this library (DVP-VAE,
arXiv:2412.01373v1): the yardstick of :mod:`.ladder`.

Nothing here is shared with ``pvae``; loss and gradients are compared before anything is timed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HandLadder"]

_LOW, _HIGH = -7.0, 7.0


class HandLadder(nn.Module):
    """A Bernoulli ladder of one-channel latents under DCT pseudoinputs, with the ELBO's closed-form KLs.

    Args:
        side: Height and width of an image.
        scales: Pairs (side, number of latents), fine to coarse.
        channels: Channels of the feature planes.
        halved: Whether the first convolution halves the image.
        scale: Scale of the pseudoinputs, shape ``(1, k, k)``.
        hidden: Width of the denoiser.
    """

    rows: Tensor
    scale: Tensor

    def __init__(
        self,
        side: int,
        scales: tuple[tuple[int, int], ...],
        channels: int,
        halved: bool,
        scale: Tensor,
        hidden: int,
    ) -> None:
        super().__init__()
        size = scale.shape[-1]
        self.side, self.channels, self.scales = side, channels, scales
        #: Scale of each latent, from the top.
        self.scale_of = [i for i in reversed(range(len(scales))) for _ in range(scales[i][1])]
        self.rho = nn.Parameter(torch.full((1, size, size), -6.0))
        self.stem = nn.Conv2d(1, channels, 4, 2, 1) if halved else nn.Conv2d(1, channels, 1)
        now, up = side // 2 if halved else side, []
        for plane, _ in scales:
            pool = [nn.AvgPool2d(now // plane)] if now != plane else []
            up.append(nn.Sequential(_Block(channels, channels, channels, activate=True), *pool))
            now = plane
        self.up = nn.ModuleList(up)
        num = len(self.scale_of)
        self.q = nn.ModuleList(_Block(channels, channels, 2) for _ in range(num))
        self.denoiser = _Denoiser(size * size, hidden)
        widths = [2 + channels] * (num - 1) + [2]
        self.p = nn.ModuleList(_Block(channels + 1, channels, width) for width in widths)
        self.lifts = nn.ModuleList(nn.Conv2d(1, channels, 1) for _ in range(num - 1))
        self.down = nn.ModuleList(_Block(channels, channels, channels) for _ in range(num - 1))
        self.read_z = nn.Conv2d(1, channels, 1)
        self.read = nn.Sequential(_Block(channels, channels, channels), nn.Conv2d(channels, 1, 3, padding=1))
        n = torch.arange(side)
        rows = torch.cos(math.pi * n[:size, None] * (n + 0.5) / side) * math.sqrt(2 / side)
        rows[0] = math.sqrt(1 / side)
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale.clone())

    def loss(self, x: Tensor) -> Tensor:
        """Minus the single-sample ELBO, mean over the batch, in nats; a scalar."""
        rho = self.rho.clamp(-12.0, -3.0)
        mean = (self.rows @ x @ self.rows.T / self.scale).clamp(-1, 1)
        noise = torch.randn_like(mean)
        u = mean + torch.exp(0.5 * rho) * noise
        log_r = -0.5 * (noise.square() + rho + math.log(2 * math.pi)).sum()
        image = 2 * (self.rows.T @ (u * self.scale) @ self.rows).clamp(0, 1) - 1
        kl, latents = self._down(self._features(2 * x - 1), image)
        a = sum(_upsampled(z, self.side) for z in latents) / math.sqrt(len(self.scale_of))
        logits = self.read(self.read_z(a))
        cost = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return (cost + kl + log_r + self._bound_of_u(u)) / len(x)

    def _features(self, x: Tensor) -> list[Tensor]:
        e, features = self.stem(x), []
        for up in self.up:
            e = up(e)
            features.append(e)
        return features

    def _down(self, features: list[Tensor], image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the sum of all KLs, and for each scale the sum of its latents."""
        contexts = [F.avg_pool2d(image, self.side // side) for side, _ in self.scales]
        h = torch.ones_like(features[-1])
        kl, latents = image.new_zeros(()), [torch.zeros_like(c) for c in contexts]
        for layer, i in enumerate(self.scale_of):
            loc_q, log_var_q = self.q[layer]((h + features[i]) / math.sqrt(2)).chunk(2, 1)
            out = self.p[layer](torch.cat([h, contexts[i]], 1))
            loc_p, log_var_p, d = out[:, :1], out[:, 1:2].clamp(-10, 1), out[:, 2:]
            log_var_q = log_var_q.clamp(-10, 1)
            z = loc_q + torch.exp(0.5 * log_var_q) * torch.randn_like(loc_q)
            ratio = log_var_p - log_var_q
            kl = kl + 0.5 * (ratio + (-ratio).exp() + (loc_q - loc_p).square() / log_var_p.exp() - 1).sum()
            latents[i] = latents[i] + z
            if layer + 1 < len(self.scale_of):
                h = self.down[layer](h + d + self.lifts[layer](z))
                h = _upsampled(h, self.scales[self.scale_of[layer + 1]][0])
        return kl, latents

    def _bound_of_u(self, u: Tensor) -> Tensor:
        """Minus the continuous-time bound on log p(u), summed over the batch."""
        order = torch.rand(len(u), device=u.device).argsort()
        first = torch.rand((), dtype=u.dtype, device=u.device)
        gamma = _LOW + (_HIGH - _LOW) * ((first + order / len(u)) % 1).to(u.dtype)
        alpha, sigma = (torch.sigmoid(g).sqrt()[:, None, None, None] for g in (-gamma, gamma))
        eps = torch.randn_like(u)
        y = alpha * u + sigma * eps
        error = eps - (sigma * y + alpha * self.denoiser(y, gamma))
        end = torch.tensor(_HIGH, dtype=u.dtype)
        last = torch.sigmoid(-end) * u.square() + torch.sigmoid(end) - F.logsigmoid(end) - 1
        constant = u.numel() * (math.log(2 * math.pi) + _LOW + 1)
        return 0.5 * (constant + (_HIGH - _LOW) * error.square().sum() + last.sum())


class _Block(nn.Module):
    def __init__(self, ins: int, inside: int, outs: int, activate: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *([nn.SiLU()] if activate else []),
            nn.Conv2d(ins, inside, 1),
            nn.SiLU(),
            nn.Conv2d(inside, inside, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(inside, inside, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(inside, outs, 1),
        )
        self.skip = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.net(x)


class _Denoiser(nn.Module):
    """Residual MLP of two blocks, scaled and shifted by the noise level."""

    frequencies: Tensor

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1.0, 17.0))
        self.level = nn.Sequential(nn.Linear(33, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.first = nn.Linear(size, hidden)
        self.blocks = nn.ModuleList(_Modulated(hidden) for _ in range(2))
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, size)

    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        tau = ((gamma + 10) / 20)[:, None]
        angle = tau * self.frequencies
        level = self.level(torch.cat([tau, angle.sin(), angle.cos()], 1))
        h = self.first(y.flatten(1))
        for block in self.blocks:
            h = block(h, level)
        return self.out(F.silu(self.norm(h))).view_as(y)


class _Modulated(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.level = nn.Linear(hidden, 2 * hidden)
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level).chunk(2, 1)
        inside = F.layer_norm(h, h.shape[1:]) * (1 + scale) + shift
        return h + self.second(F.silu(self.first(F.silu(inside))))


def _upsampled(x: Tensor, side: int) -> Tensor:
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
