"""Prior against aggregate posterior, by draws: tests, distances, holes, marginals, information, activity."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program
from pvae.inference.progress import reporting

from .activity import Activity, activity_of
from .alignment import _LEAST, _MEAN_DRAWS, Measure, _context, _figure, _row, _Samples
from .blocks import block_seed
from .c2st import C2ST, Classifier, classifier_test
from .holes import Holes, find_holes
from .interval import bootstrap_intervals
from .latents import draw_posterior, draw_prior, means, shared_latents
from .marginals import Marginals, match_marginals
from .mutual_information import MutualInformation, information_of
from .two_sample import Kernel, gaussian_w2
from .weights import held_out

__all__ = ["PriorMatch", "prior_match"]

_STEPS = 7
# Dimensions above which a distance takes a second, and resamples behind its interval then.
_MANY, _FEW = 256, 20
_THRESHOLD = 0.01  # of Burda et al. for an active unit


@dataclass(frozen=True)
class PriorMatch:
    r"""How one draw of the guide for each datum compares with draws of the prior.

    Tests and distances are taken in coordinates where a third sample, of the prior, is white. Read them
    beside ``activity`` and ``information``: a posterior that ignores the data matches its prior too.

    Attributes:
        mmd2: Unbiased squared MMD with its permutation p-value; the null is that of two samples of the prior.
        c2st: Held-out accuracy of classifiers trained on other points, by name: ``"logistic"`` sees means
            alone, ``"mlp"`` all there is; a test each. 0.5 is perfect. A weak classifier makes it too small,
            so that accuracy at chance proves no match.
        c2st_with_y: The same with the context among the inputs, ``"mlp"``; ``None`` without contexts.
        w2: Squared Wasserstein distance of the Gaussians with the samples' moments. Too large by about its
            null, for samples of one distribution.
        holes: Draws of the prior far from all codes.
        marginals: Dimension by dimension.
        activity: Which dimensions the data move, with intervals.
        information: Bounds on I(x; z) and on KL(q_agg ‖ p).
        kernel: Kernel of the MMD.
        num_data: Number of data.
        num_prior: Number of prior draws.
        seed: Seed of all draws.
        protocol: What the data were, if known.
    """

    mmd2: Measure
    c2st: dict[Classifier, C2ST]
    c2st_with_y: C2ST | None
    w2: Measure
    holes: Holes
    marginals: Marginals
    activity: Activity
    information: MutualInformation
    kernel: Kernel
    num_data: int
    num_prior: int
    seed: int
    protocol: dict[str, Any] | None = None

    @property
    def differs(self) -> dict[str, float]:
        """p-values of all tests that prior and codes have one distribution, by name."""
        tests = {"MMD": self.mmd2.p_value, "holes": self.holes.p_value}
        tests |= {f"C2ST, {name}": test.p_value for name, test in self.c2st.items()}
        if self.c2st_with_y is not None:
            tests["C2ST with y"] = self.c2st_with_y.p_value
        return tests

    @property
    def p_value(self) -> float:
        """The least of them, times their number (Bonferroni): a p-value of all together."""
        return min(1.0, min(self.differs.values()) * len(self.differs))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold; draws are left out."""
        return {
            "mmd2": self.mmd2.to_dict(),
            "kernel": self.kernel,
            "c2st": {name: test.to_dict() for name, test in self.c2st.items()},
            "c2st_with_y": None if self.c2st_with_y is None else self.c2st_with_y.to_dict(),
            "w2": self.w2.to_dict(),
            "holes": self.holes.to_dict(),
            "marginals": self.marginals.to_dict(),
            "activity": self.activity.to_dict(),
            "information": self.information.to_dict(),
            "p_values": self.differs,
            "p_value": self.p_value,
            "num_data": self.num_data,
            "num_prior": self.num_prior,
            "seed": self.seed,
            "protocol": self.protocol,
        }

    def to_markdown(self) -> str:
        """Return a table of the tests and distances, and a sentence for each of the rest."""
        head = ["prior match", "value", "95 % interval", "prior against prior", "perfect", "p"]
        lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
        rows = [
            (f"MMD², {self.kernel} kernel", self.mmd2, "0"),
            ("squared Gaussian W2, whitened", self.w2, "0"),
        ]
        for label, measure, perfect in rows:
            reach = _reach(measure.low, measure.high)
            p = "" if math.isnan(measure.p_value) else f"{measure.p_value:.2g}"
            lines.append(_row([label, _figure(measure.value), reach, _figure(measure.null), perfect, p]))
        tests = [(f"C2ST accuracy, {name}", test) for name, test in self.c2st.items()]
        if self.c2st_with_y is not None:
            tests.append(("C2ST accuracy, mlp, with y", self.c2st_with_y))
        for label, test in tests:
            reach = _reach(test.interval.low, test.interval.high)
            lines.append(_row([label, _figure(test.accuracy), reach, "", "0.5", f"{test.p_value:.2g}"]))
        share = self.holes.share
        lines.append(
            _row(
                [
                    "prior draws far from codes",
                    _figure(share.value),
                    _reach(share.low, share.high),
                    "",
                    f"{self.holes.level:g}",
                    f"{self.holes.p_value:.2g}",
                ]
            )
        )
        said = (self.holes, self.marginals, self.activity, self.information)
        return "\n".join([*lines, "", *(f"- {part}" for part in said)])

    def __str__(self) -> str:
        best = max(self.c2st, key=lambda name: self.c2st[name].accuracy)
        return (
            f"prior against codes of {self.num_data} data: p = {self.p_value:.2g} for a match "
            f"(MMD² {self.mmd2.value:.3g}, of two prior samples {self.mmd2.null:.3g}; C2ST {best} "
            f"{self.c2st[best]}; squared W2 {self.w2.value:.3g}, of two prior samples {self.w2.null:.3g}, "
            f"both biased upwards); {self.holes}; {self.information}; {self.activity}"
        )


def prior_match(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_prior: int | None = None,
    kernel: Kernel = "rbf",
    hole_level: float = 0.05,
    num_bootstrap: int = 200,
    max_points: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
) -> PriorMatch:
    """Say how well the prior matches the aggregate posterior of held-out data.

    Draws of the prior are runs of the model with nothing replayed, in a conditional model under the contexts
    of the data; latents of several sites stand side by side. The prior need not have a density: what needs
    one is then left out (:class:`MutualInformation`) or estimated (:class:`Marginals`). Both programs run in
    evaluation mode and are left, with all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``.
        guide: The guide program, with a density.
        x: Held-out data, shape ``(N, *x_shape)``, at least 20, or a split. Data the model was trained on make
            it look aligned.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_prior: Number of prior draws; by default N.
        kernel: Kernel of the MMD (:func:`mmd2`).
        hole_level: Share of codes that count as far from the others (:func:`find_holes`).
        num_bootstrap: Resamples behind an interval (that of ``w2`` above 256 dimensions: 20); 0 leaves the
            intervals out.
        max_points: Points of each sample in all whose cost is quadratic.
        seed: Seed of every draw.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes out of range, data the likelihood does not support, or programs outside the
            contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.

    Example:
        >>> print(prior_match(model, guide, data.test).to_markdown())  # doctest: +SKIP
    """
    x, y, protocol = held_out(model, x, y)
    num_prior = len(x) if num_prior is None else num_prior
    for name, size in (("x", len(x)), ("num_prior", num_prior), ("max_points", max_points)):
        if size < _LEAST:
            raise ValueError(f"{name} must be at least {_LEAST}, got {size}")
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap must not be negative, got {num_bootstrap}")
    device = device_of(model, guide)
    with evaluating(model, guide), reporting("prior match", _STEPS, progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        names = shared_latents(model, guide, x, y)
        # Not the seed itself, which data that were simulated may have had.
        seeds = [block_seed(seed + 1, i) for i in range(4)]
        q = draw_posterior(model, guide, x, y, names, seeds[0])
        mean, error = means(guide, x, y, names, seeds[1], _MEAN_DRAWS)
        p = draw_prior(model, x, y, names, num_prior, seeds[2])
        null = draw_prior(model, x, y, names, len(x), seeds[3])
        report(1, "information")
        information = information_of(guide, q, x, y, num_bootstrap, seed, protocol)
        report(2, "marginals")
        marginals = match_marginals(model, guide, x, y, names, q, p, max_points, seed)
        context = None if y is None else _context(y.cpu())
        samples = _Samples(q, p, null, context, num_bootstrap, max_points, seed, apart=True)
        report(3, "MMD")
        mmd2 = samples.mmd2(kernel)
        report(4, "W2")
        w2 = _w2(samples)
        report(5, "classifiers")
        kinds: tuple[Classifier, ...] = ("logistic", "mlp")
        codes, draws, _ = samples.points()
        tests = {kind: classifier_test(codes, draws, seed, classifier=kind) for kind in kinds}
        with_y = None
        if context is not None:
            codes_y, draws_y, _ = samples.points(with_y=True)
            with_y = classifier_test(codes_y, draws_y, seed)
        report(6, "holes")
        holes = find_holes(codes, draws, level=hole_level, seed=seed)
        sizes = {name: p.values[name][0].numel() for name in names}
        scales = torch.cat([p.z, null.z]).std(0)
        activity = activity_of(mean, error, scales, _THRESHOLD, sizes, num_bootstrap, seed)
        report(_STEPS)
    return PriorMatch(
        mmd2=mmd2,
        c2st=tests,
        c2st_with_y=with_y,
        w2=w2,
        holes=holes,
        marginals=marginals,
        activity=activity,
        information=information,
        kernel=kernel,
        num_data=len(x),
        num_prior=num_prior,
        seed=seed,
        protocol=protocol,
    )


def _w2(samples: _Samples) -> Measure:
    codes, prior, null = samples.points()
    num = samples.num_bootstrap if codes.shape[1] <= _MANY else min(samples.num_bootstrap, _FEW)

    def distance(i: Tensor, j: Tensor) -> Tensor:
        return torch.tensor(gaussian_w2(codes[i], prior[j]), dtype=torch.float64)

    sizes = len(codes), len(prior)
    (found,) = bootstrap_intervals(distance, *sizes, num_bootstrap=num, seed=samples.seed, least=0.0)
    return Measure(found.value, found.low, found.high, gaussian_w2(null, prior))


def _reach(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{_figure(low)} to {_figure(high)}"
