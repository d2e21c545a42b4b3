"""Variational autoencoders as one writes them without this library: the yardsticks of :mod:`.steps`, and the
loop of :mod:`.ladder`, too.

Nothing here is shared with ``pvae.nn``, ``pvae.likelihoods`` or ``pvae.inference``; a test copies the weights
across and compares loss and gradients, so that both sides of a ratio do the same work.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CapturedLoop", "HandLoop", "HandVAE", "adam", "adamax", "conv_vae", "mlp_vae"]


class HandNet(Protocol):
    """What a loop needs of a net."""

    def loss(self, x: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def adamax(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adamax(parameters, lr=1e-3, foreach=True)


class HandVAE(nn.Module):
    """A Bernoulli VAE with the Monte-Carlo ELBO.

    Args:
        encoder: Maps ``(B, *x_shape)`` to ``(B, 2 * z_dim)``: locations, then log-variances.
        decoder: Maps ``(B, z_dim)`` to logits, ``(B, *x_shape)`` or flattened.
    """

    def __init__(self, encoder: nn.Sequential, decoder: nn.Sequential) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def loss(self, x: Tensor) -> Tensor:
        """Minus the single-sample ELBO, mean over the batch, in nats; a scalar."""
        loc, log_var = self.encoder(x).chunk(2, dim=-1)
        # The log-variance is kept within (-14, 6), as the library's encoders do.
        scale = torch.exp(0.5 * (6.0 - F.softplus(20.0 - F.softplus(log_var + 14.0))))
        noise = torch.randn_like(loc)
        z = loc + scale * noise
        # log q(z | x) - log p(z); the constants cancel.
        kl = (0.5 * (z.square() - noise.square()) - scale.log()).sum()
        logits = self.decoder(z).view_as(x)
        return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl) / len(x)


class HandLoop:
    """A training loop on data that lie on the device, with one optimiser and no wait inside.

    Args:
        net: What is trained.
        levels: Grey levels, shape ``(N, *x_shape)``, uint8.
        batch_size: Data per step.
        compile: Whether loss and gradient go through ``torch.compile``.
        optimizer: Makes the optimiser of the net's parameters.
    """

    def __init__(
        self,
        net: HandNet,
        levels: Tensor,
        batch_size: int,
        compile: bool = False,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = adam,
    ) -> None:
        self.levels, self.batch_size = levels, batch_size
        self.loss = torch.compile(net.loss, fullgraph=True, dynamic=False) if compile else net.loss
        self.optimizer = optimizer(net.parameters())

    def run(self, steps: int) -> float:
        """Take ``steps`` steps in one shuffled pass; return their mean loss in nats per datum."""
        order = torch.randperm(len(self.levels), device=self.levels.device)
        losses = []
        for index in order[: steps * self.batch_size].split(self.batch_size):
            p = self.levels.index_select(0, index).float() / 255
            x = (torch.rand_like(p) < p).float()
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(x)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())


class CapturedLoop:
    """The same step captured once as a CUDA graph, and replayed for each batch.

    Args:
        net: What is trained, on a CUDA device.
        levels: Grey levels, shape ``(N, *x_shape)``, uint8, on the same.
        batch_size: Data per step.
    """

    def __init__(self, net: HandNet, levels: Tensor, batch_size: int) -> None:
        self.net, self.levels, self.batch_size = net, levels, batch_size
        self.optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True, capturable=True)
        self.index = torch.arange(batch_size, device=levels.device)
        self.total = torch.zeros((), device=levels.device)
        # Libraries choose their kernels in the first steps, which must not be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        p = self.levels.index_select(0, self.index).float() / 255
        loss = self.net.loss((torch.rand_like(p) < p).float())
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def run(self, steps: int) -> float:
        """Take ``steps`` steps in one shuffled pass; return their mean loss in nats per datum."""
        order = torch.randperm(len(self.levels), device=self.levels.device)
        self.total.zero_()
        for index in order[: steps * self.batch_size].split(self.batch_size):
            self.index.copy_(index)
            self.graph.replay()
        return float(self.total) / steps


def mlp_vae(x_dim: int, hidden: tuple[int, ...], z_dim: int) -> HandVAE:
    """Fully connected; the decoder has the encoder's widths in reverse."""
    encoder = nn.Sequential(nn.Flatten(), *_relu_layers(x_dim, hidden), nn.Linear(hidden[-1], 2 * z_dim))
    decoder = nn.Sequential(*_relu_layers(z_dim, hidden[::-1]), nn.Linear(hidden[0], x_dim))
    return HandVAE(encoder, decoder)


def _relu_layers(width: int, hidden: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for out in hidden:
        layers += [nn.Linear(width, out), nn.ReLU()]
        width = out
    return layers


def conv_vae(z_dim: int) -> HandVAE:
    """Convolutional, for ``(1, 28, 28)``: two strided convolutions down, two transposed ones up."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.GroupNorm(8, 32),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 256),
        nn.SiLU(),
        nn.Linear(256, 2 * z_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(z_dim, 256),
        nn.SiLU(),
        nn.Linear(256, 64 * 7 * 7),
        nn.Unflatten(1, (64, 7, 7)),
        nn.GroupNorm(8, 64),
        nn.SiLU(),
        nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1),
        nn.GroupNorm(8, 32),
        nn.SiLU(),
        nn.ConvTranspose2d(32, 32, 3, stride=2, padding=1, output_padding=1),
        nn.GroupNorm(8, 32),
        nn.SiLU(),
        nn.Conv2d(32, 1, 3, padding=1),
    )
    return HandVAE(encoder, decoder)
