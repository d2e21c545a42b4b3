"""A variational autoencoder as a scikit-learn estimator: density, transformer and sampler in one."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from pvae.data import Data, from_tensors
from pvae.evaluation import LikelihoodEstimate, log_likelihood
from pvae.evaluation.latents import means
from pvae.guides import FiveGuide, FlowGuide, FullCovarianceGuide, LaplaceGuide, NormalGuide
from pvae.inference import fit
from pvae.inference.isolation import device_of, evaluating, isolated_rng
from pvae.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    Likelihood,
    NegativeBinomial,
    Normal,
    Poisson,
)
from pvae.models import VAE
from pvae.nn import ConvDecoder, ConvEncoder, Encoder, MLPDecoder, MLPEncoder
from pvae.priors import GaussianMixture, StandardNormal, VampPrior

__all__ = ["VAEDensity"]

Array = np.ndarray[Any, np.dtype[np.float64]]

_LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}
_POSTERIORS: dict[str, Callable[..., nn.Module]] = {
    "normal": lambda encoder, decoder, likelihood: NormalGuide(encoder),
    "full_covariance": lambda encoder, decoder, likelihood: FullCovarianceGuide(encoder),
    "flow": lambda encoder, decoder, likelihood: FlowGuide(encoder),
    "five": FiveGuide,
    "laplace": LaplaceGuide,
}
_PRIORS = ("normal", "mixture", "vamp")
# What pseudoinputs are kept within: the range of the data.
_BOUNDS = {"bernoulli": (0.0, 1.0), "continuous_bernoulli": (0.0, 1.0)}
_STEPS, _EPOCHS = 2000, 20  # of training, at least
_ROUNDS = 100  # draws behind a posterior mean that has no closed form


class VAEDensity(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    r"""A variational autoencoder that scikit-learn can clone, search, chain and store.

    Rows are data: a table ``(n, d)``; images ``(n, C, H, W)``; or images as rows of a table, with
    ``x_shape``. What is given back (``sample``, ``inverse_transform``) has the form that was fitted. NaN is
    refused.

    ``score`` and ``score_samples`` are the importance-weighted lower bound on log p(x) in nats, in the units
    of the data given: where the estimator standardises, the logarithms of the scales are taken off. Fewer
    particles give a lower bound, never a higher one in expectation, so that models are ranked by what
    they can be shown to assign. Within a pipeline it is the density of what the steps before hand on, which
    compares only among pipelines with the same steps.

    Args:
        z_dim: Number of latent dimensions.
        hidden: Widths of the encoder's hidden layers, or channels of its convolutions; the decoder has them
            in reverse. With none and ``network="mlp"`` both are linear: factor analysis.
        network: ``"mlp"`` or ``"conv"`` (images).
        activation: One of relu, tanh, silu, elu, gelu, softplus.
        prior: ``"normal"``, ``"mixture"`` of diagonal Gaussians, or ``"vamp"``, a mixture of posteriors of
            learned pseudoinputs.
        components: Of the mixture; pseudoinputs, at most as many as there are training data.
        posterior: ``"normal"`` (diagonal), ``"full_covariance"``, ``"flow"``, ``"five"`` or ``"laplace"``
            (the last two with a normal likelihood).
        likelihood: ``"normal"``, with a learned scale of noise for each column of a table and each channel
            of images; ``"bernoulli"`` (0 and 1), ``"continuous_bernoulli"`` (0 to 1), ``"poisson"`` or
            ``"negative_binomial"`` (0, 1, 2, ...).
        x_shape: Shape ``(C, H, W)`` of the images in the rows of a table.
        standardise: Whether a normal likelihood sees data of mean zero and variance one, each column of a
            table and each channel of images by itself. Constant ones are shifted alone. Data of other
            likelihoods have units of their own and are never changed.
        epochs: Passes over the training data; by default as many as 2,000 steps take, at least 20.
        batch_size: Data per step, at most as many as there are.
        lr: Highest learning rate, of a cosine.
        objective: ``"elbo"``, ``"mean_field"``, ``"iwae"`` or ``"dreg"``.
        train_particles: Particles per datum in training.
        validation_fraction: Share of the data that is held back, for ``patience``.
        patience: Stop after so many epochs without a better bound on those data, and return to the best.
        num_particles: Particles of a score.
        device: Where to train and score; by default the CPU.
        random_state: Seed, or generator, of the start, the training, and every later score: a fitted
            estimator gives a datum at the same place of its table the same score.
        verbose: Whether to show progress bars.

    Attributes:
        model_: The model program.
        guide_: The guide program.
        x_shape_: Shape of one datum.
        loc_: What is subtracted from the data, shape ``(d,)``, d all entries of a datum.
        scale_: What they are divided by.
        flat_: Whether the data fitted were rows of a table.
        seed_: Seed of training and scores.
        history_: Rows of the training history.
        n_features_in_: d.
        feature_names_in_: Names of the columns, where a data frame brought them.

    Example:
        >>> from sklearn.model_selection import GridSearchCV
        >>> search = GridSearchCV(VAEDensity(random_state=0), {"z_dim": [1, 2, 4]})  # doctest: +SKIP
        >>> search.fit(table).best_params_  # doctest: +SKIP
    """

    def __init__(
        self,
        z_dim: int = 2,
        *,
        hidden: Sequence[int] = (64,),
        network: Literal["mlp", "conv"] = "mlp",
        activation: str = "relu",
        prior: Literal["normal", "mixture", "vamp"] = "normal",
        components: int = 10,
        posterior: Literal["normal", "full_covariance", "flow", "five", "laplace"] = "normal",
        likelihood: Literal[
            "normal", "bernoulli", "continuous_bernoulli", "poisson", "negative_binomial"
        ] = "normal",
        x_shape: Sequence[int] | None = None,
        standardise: bool = True,
        epochs: int | None = None,
        batch_size: int = 128,
        lr: float = 3e-3,
        objective: Literal["elbo", "mean_field", "iwae", "dreg"] = "elbo",
        train_particles: int = 1,
        validation_fraction: float = 0.0,
        patience: int | None = None,
        num_particles: int = 100,
        device: str | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.z_dim = z_dim
        self.hidden = hidden
        self.network = network
        self.activation = activation
        self.prior = prior
        self.components = components
        self.posterior = posterior
        self.likelihood = likelihood
        self.x_shape = x_shape
        self.standardise = standardise
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.objective = objective
        self.train_particles = train_particles
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.num_particles = num_particles
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on data.

        Args:
            X: At least two data, see the class.
            y: Not used.

        Raises:
            ValueError: If the data are not finite numbers of the support of the likelihood, or a setting is
                out of range.
        """
        x = self._rows(X, fitting=True)
        self._check_words()
        self.loc_, self.scale_ = self._units(x)
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        data = self._split(self._standardised(x))
        num = len(data.train)
        batch_size = min(self.batch_size, num)
        with isolated_rng(torch.device("cpu"), self.seed_):
            model, guide = self._programs(data.train.x)
        likelihood = model.likelihood
        assert isinstance(likelihood, Likelihood)
        likelihood.check(data.train.x)
        epochs = self.epochs
        if epochs is None:
            epochs = max(_EPOCHS, -(-_STEPS * batch_size // num)) if batch_size > 0 else _EPOCHS
        run = fit(
            model,
            guide,
            data,
            epochs=epochs,
            batch_size=batch_size,
            lr=self.lr,
            schedule="cosine",
            objective=self.objective,
            num_particles=self.train_particles,
            patience=self.patience,
            device=self.device,
            seed=self.seed_,
            progress=bool(self.verbose),
        )
        self.model_, self.guide_, self.history_ = model, guide, run.history
        return self

    def log_likelihood(self, X: Any) -> LikelihoodEstimate:
        """Bound log p(x) of data, with all its evidence, in nats and in the units of the data given.

        Args:
            X: Data, see the class.
        """
        x = self._rows(X)
        estimate = log_likelihood(
            self.model_,
            self.guide_,
            self._standardised(x),
            num_particles=self.num_particles,
            seed=self.seed_,
            progress=bool(self.verbose),
        )
        # dx' = dx / scale: the same event has so many times the density.
        change = float(np.log(self.scale_).sum())
        return dataclasses.replace(
            estimate, log_prob=estimate.log_prob - change, elbo_values=estimate.elbo_values - change
        )

    def score_samples(self, X: Any) -> Array:
        """Return a lower bound on log p(x) of each datum, nats, shape ``(n,)``.

        Args:
            X: Data, see the class.
        """
        values: Array = self.log_likelihood(X).log_prob.numpy()
        return values

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean of :meth:`score_samples`, nats per datum.

        Args:
            X: Data, see the class.
            y: Not used.
        """
        return float(self.score_samples(X).mean())

    def transform(self, X: Any) -> Array:
        """Return posterior means of z, shape ``(n, z_dim)``; those of a flow are means of 100 draws.

        Args:
            X: Data, see the class.
        """
        x = self._standardised(self._rows(X)).to(device_of(self.model_, self.guide_))
        num_draws = _ROUNDS if isinstance(self.guide_, FlowGuide) else 1
        with evaluating(self.model_, self.guide_):
            codes: Array = means(self.guide_, x, None, ["z"], self.seed_, num_draws)[0].numpy()
        return codes

    def inverse_transform(self, X: Any) -> Array:
        """Return means of p(x | z) in the units and the form of the data fitted.

        Args:
            X: Latents, shape ``(n, z_dim)``.

        Raises:
            ValueError: If they have another width.
        """
        check_is_fitted(self, "model_")
        z = check_array(X, dtype=np.float64)
        if z.shape[1] != self._n_features_out:
            raise ValueError(f"X must have {self._n_features_out} latent columns, got {z.shape[1]}")
        with evaluating(self.model_):
            codes = torch.from_numpy(z).to(device_of(self.model_), torch.float32)
            return self._restored(self.model_.decode(codes).mean)

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw data from the model, in the units and the form of the data fitted.

        Args:
            n_samples: Number of draws, positive.
            random_state: Seed or generator of the draws; ``None`` for NumPy's global one.
        """
        check_is_fitted(self, "model_")
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        with evaluating(self.model_):
            torch.manual_seed(seed)
            return self._restored(self.model_.sample(n_samples))

    @property
    def _n_features_out(self) -> int:
        prior: Any = self.model_.prior
        return int(prior.z_dim)

    def _rows(self, X: Any, fitting: bool = False) -> Array:
        """Check data and lay each datum out as a row; note the form of those that are fitted."""
        if not fitting:
            check_is_fitted(self, "model_")
        x_shape = None if self.x_shape is None else tuple(self.x_shape)
        shape = getattr(X, "shape", None)
        ndim = np.asarray(X).ndim if shape is None else len(shape)
        if ndim == 4:
            X = np.asarray(X)
            if x_shape not in (None, X.shape[1:]):
                raise ValueError(f"x_shape must be that of the images, {X.shape[1:]}, got {x_shape}")
            x_shape = X.shape[1:]
            X = X.reshape(len(X), math.prod(x_shape))
        elif ndim > 2:
            raise ValueError(f"X must have shape (n, d) or (n, C, H, W), got {np.shape(X)}")
        least = 2 if fitting else 1
        x: Array = validate_data(self, X, reset=fitting, dtype=np.float64, ensure_min_samples=least)
        if fitting:
            x_shape = x.shape[1:] if x_shape is None else x_shape
            if len(x_shape) not in (1, 3) or math.prod(x_shape) != x.shape[1]:
                raise ValueError(f"x_shape must have {x.shape[1]} entries as (C, H, W), got {x_shape}")
            self.x_shape_ = x_shape
            self.flat_ = ndim != 4
        return x

    def _check_words(self) -> None:
        for name, known in (
            ("network", ("mlp", "conv")),
            ("prior", _PRIORS),
            ("posterior", tuple(_POSTERIORS)),
            ("likelihood", ("normal", *_LIKELIHOODS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.network == "conv" and len(self.x_shape_) != 3:
            raise ValueError("network 'conv' needs images (n, C, H, W), or x_shape=(C, H, W), got a table")
        if self.posterior in ("five", "laplace") and self.likelihood != "normal":
            raise ValueError(
                f"posterior {self.posterior!r} needs likelihood 'normal', got {self.likelihood!r}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {self.validation_fraction}")
        if self.patience is not None and self.validation_fraction == 0:
            raise ValueError("validation_fraction must be positive where patience is set, got 0")

    def _units(self, x: Array) -> tuple[Array, Array]:
        """Location and scale of each entry of a datum."""
        width = x.shape[1]
        if not self.standardise or self.likelihood != "normal":
            return np.zeros(width), np.ones(width)
        # Columns of a table; channels of images, whose pixels share units.
        groups = x.reshape(len(x), self.x_shape_[0], -1)
        loc, scale = groups.mean((0, 2)), groups.std((0, 2))
        # A constant column has no scale but the rounding of its mean.
        scale = np.where(scale > 1e-12 * np.maximum(1.0, np.abs(loc)), scale, 1.0)
        each = width // self.x_shape_[0]
        return np.repeat(loc, each), np.repeat(scale, each)

    def _standardised(self, x: Array) -> Tensor:
        """The data as the networks see them, single precision, shape ``(n, *x_shape)``."""
        rows = ((x - self.loc_) / self.scale_).astype(np.float32)
        return torch.from_numpy(rows.reshape(len(rows), *self.x_shape_))

    def _restored(self, x: Tensor) -> Array:
        """Data of the networks in the units and the form of those fitted."""
        rows = x.detach().cpu().double().flatten(1).numpy() * self.scale_ + self.loc_
        return rows if self.flat_ else rows.reshape(len(rows), *self.x_shape_)

    def _split(self, x: Tensor) -> Data:
        num = round(self.validation_fraction * len(x))
        if self.validation_fraction == 0:
            return from_tensors(x, scale="real")
        if not 0 < num < len(x):
            raise ValueError(
                f"validation_fraction must leave data on both sides of {len(x)}, "
                f"got {self.validation_fraction}"
            )
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed_))
        return from_tensors(x[order[num:]], valid=x[order[:num]], scale="real")

    def _programs(self, x: Tensor) -> tuple[VAE, nn.Module]:
        shape, widths = self.x_shape_, tuple(self.hidden)
        likelihood: Likelihood
        if self.likelihood == "normal":
            likelihood = Normal("learned", channels=shape[0])
        else:
            likelihood = _LIKELIHOODS[self.likelihood]()
        out_shape = likelihood.param_shape(shape)
        encoder: Encoder
        decoder: nn.Module
        if self.network == "conv":
            encoder = ConvEncoder(shape, self.z_dim, widths, activation=self.activation)
            decoder = ConvDecoder(self.z_dim, out_shape, widths[::-1], activation=self.activation)
        else:
            encoder = MLPEncoder(shape, self.z_dim, widths, self.activation)
            decoder = MLPDecoder(self.z_dim, out_shape, widths[::-1], self.activation)
        prior: nn.Module
        if self.prior == "normal":
            prior = StandardNormal(self.z_dim)
        elif self.prior == "mixture":
            prior = GaussianMixture(self.z_dim, self.components)
        else:
            prior = self._vamp(encoder, x)
        model = VAE(prior, decoder, likelihood)
        guide = _POSTERIORS[self.posterior](encoder, decoder, likelihood)
        # Whatever torch's default, as the data are in single precision.
        return model.float(), guide.float()

    def _vamp(self, encoder: Encoder, x: Tensor) -> VampPrior:
        """Start the pseudoinputs at data with a little noise, inside the bounds: at them is no gradient."""
        if not 1 <= self.components <= len(x):
            raise ValueError(
                f"components must lie between 1 and the {len(x)} training data, got {self.components}"
            )
        u = x[torch.randperm(len(x))[: self.components]]
        u = u + 0.01 * torch.randn_like(u)
        bounds = _BOUNDS.get(self.likelihood)
        if bounds is not None:
            low, high = bounds
            u = u.clamp(low + 0.01, high - 0.01)
        return VampPrior(encoder, u, bounds)
