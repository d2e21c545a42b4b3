"""The parts of a judgement, each a name, what it computes of a run, and what is drawn of that."""

import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from pvae.data import Split
from pvae.evaluation import (
    Interval,
    OODDetection,
    OODScore,
    RankCalibration,
    aggregate_calibration,
    annealed_likelihood,
    bidirectional,
    bootstrap_intervals,
    detect,
    familiar_data,
    fit_classifier,
    inference_gaps,
    label_candidates,
    log_likelihood,
    nested_likelihood,
    ood_scores,
    pixel_levels,
    predictive_check,
    prior_match,
    sample_quality,
    simulation_based_calibration,
)
from pvae.evaluation.latents import draw_prior, means, shared_latents
from pvae.inference.isolation import device_of, evaluating
from pvae.priors import DiffusionPrior

from . import evidence_figures as drawn
from . import figures, sampling
from .diagnosing import LABELS, Wanted, diagnose, load_outside, spread
from .evidence import Job, Part, Size, Sizes, asked_of, proposals_of
from .evidence_figures import Drawing, Raster

__all__ = ["PARTS"]

_CHAINS, _LEAPFROG = 16, 2
_DRAWS = 99
_REPLICATES = 299
# A gradient of the decoder costs about so many passes.
_GRADIENT = 3
_SHOWN_CODES, _CODE_DRAWS = 500, 16
_SHOWN_IMAGES = 48
# Quantities whose histograms are kept, those that depart most.
_MOST_QUANTITIES = 12

Record = Mapping[str, Any]


class _Part:
    """What most parts have in common."""

    name: ClassVar[str]
    heading: ClassVar[str]
    about: ClassVar[str]
    sizes: ClassVar[Mapping[str, Size]] = {}

    def applies(self, job: Job) -> str | None:
        """Leave nothing out beforehand."""
        return None

    def rows(self, sizes: Sizes) -> float:
        """Cost nothing that a decoder's passes measure."""
        return 0.0

    def asked(self, wanted: Wanted) -> dict[str, Any]:
        """Depend on the seed alone."""
        return {"seed": wanted.seed}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw nothing."""
        return []


class Latents(_Part):
    """What a diagnosis was before there were parts: its sizes are options of their own."""

    name = "latents"
    heading = "prior, layers, density, data from elsewhere"
    about = "prior against codes, coverage, layers, log p(z) against a density, scores of the latents"

    def asked(self, wanted: Wanted) -> dict[str, Any]:
        """Depend on every wish."""
        return asked_of(wanted)

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Compute, keep ``diagnosis.json`` and draw its pictures."""
        found = diagnose(job.run, job.wanted, root=job.root, download=job.download, progress=job.progress)
        pictures = [path.relative_to(job.run.folder.path).as_posix() for path in found.pictures]
        result = {
            "sections": [list(section) for section in found.sections()],
            "pictures": pictures,
            "diagnosis": found.to_dict(per_datum=False),
        }
        return {"text": found.to_text(), "result": result}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw the layers."""
        layers = record["result"]["diagnosis"]["layers"]
        if layers is None:
            return []
        of_test = layers["test"]["layers"]
        rates = ", ".join(f"{name} {of['kl']:.2f}" for name, of in of_test.items())
        found: list[Drawing | Raster] = [
            Drawing(
                "layers",
                f"Bars of the KL of each layer on held-out data, in nats: {rates}; training data beside.",
                "KL of each layer with its standard error.",
                partial(drawn.layer_rates, layers),
            )
        ]
        planes = [name for name, of in of_test.items() if of["kl_plane"] is not None]
        if planes:
            found.append(
                Drawing(
                    "layer maps",
                    f"Maps of the mean KL by place of the layers {', '.join(planes)}.",
                    "Where in the image each layer pays, mean KL in nats, on one scale of colours.",
                    partial(drawn.layer_maps, of_test),
                )
            )
        return found


class Pictures(_Part):
    """What the model makes of data, and what it makes up."""

    name = "pictures"
    heading = "reconstructions and samples"
    about = "held-out data beside their reconstructions, and samples of the model"

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Draw from guide, decoder and prior."""
        run, seed = job.run, job.wanted.seed
        shown = sampling.held_out(run.data)
        x, rebuilt = figures.reconstructed(run.program, shown)
        num = _SHOWN_IMAGES if x.ndim == 4 else len(x)
        conditional = getattr(run.model, "conditional", False)
        y = sampling.held_out_labels(run.data, num, seed) if conditional else None
        of_prior, draws = figures.draw_samples(run.program, num, seed, y)
        sets = {"data": x, "reconstructions": rebuilt, "samples": of_prior, "draws": draws}
        text = f"{len(x)} data of the {shown.name} part and {num} samples"
        if x.ndim != 4:
            points = {name: _plane(each) for name, each in sets.items()}
            return {"text": text, "result": {"kind": "points", **points}}
        bounds = figures.value_range(shown)
        grids = {
            "reconstructions": _png(figures._grid(torch.cat((x, rebuilt)), len(x), bounds)),
            "samples": _png(figures._grid(of_prior, 8, bounds)),
            "draws": _png(figures._grid(draws, 8, bounds)),
        }
        size = {"images": len(x), "part": shown.name, "num_samples": num, "small": x.shape[-1] <= 64}
        return {"text": text, "result": {"kind": "images", "pictures": grids, **size}}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Show images as they are, and other data as points."""
        found = record["result"]
        if found["kind"] == "points":
            pairs = (
                ("reconstructions", {"data": found["data"], "reconstruction": found["reconstructions"]}),
                ("samples", {"data": found["data"], "draws x ~ p(x | z), z ~ p(z)": found["draws"]}),
            )
            return [
                Drawing(
                    name,
                    f"Scatter plot of {' and '.join(clouds)}, {len(found['data'])} points each.",
                    f"First two numbers of x: {' and '.join(clouds)}.",
                    partial(drawn.point_clouds, clouds),
                )
                for name, clouds in pairs
            ]
        captions = {
            "reconstructions": f"Data of the {found['part']} part above their reconstructions, the "
            "means of p(x | z) "
            "for one draw of z from the guide.",
            "samples": "Means of p(x | z), z drawn from the prior.",
            "draws": "Draws x ~ p(x | z) for the same z: the samples of the model.",
        }
        alts = {
            "reconstructions": f"{found['images']} images in a row above their reconstructions.",
            "samples": f"A grid of {found['num_samples']} means of p(x | z) with z from the prior.",
            "draws": f"A grid of {found['num_samples']} samples of the model.",
        }
        return [
            Raster(name, alts[name], captions[name], found["pictures"][name], found["small"])
            for name in captions
        ]


class Codes(_Part):
    """Where the guide puts data, and where the prior draws."""

    name = "codes"
    heading = "codes"
    about = "posterior means in the plane, over draws of the prior"

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Encode held-out data; more than two dimensions are projected on the first two principal axes."""
        split, programs = job.test(_SHOWN_CODES), job.run.program
        device = device_of(*programs)
        y = split.y if getattr(programs.model, "conditional", False) else None
        with evaluating(*programs):
            x = split.x.to(device)
            y = None if y is None else y.to(device)
            names = shared_latents(*programs, x, y)
            codes = means(programs.guide, x, y, names, job.wanted.seed, _CODE_DRAWS)[0]
            prior = draw_prior(programs.model, x, y, names, len(x), job.wanted.seed).z
        points, of_prior, axes = _projected(codes, prior)
        result = {
            "points": _rounded(points),
            "prior": _rounded(of_prior),
            "labels": _labels(split),
            "axes": axes,
            "z_dim": codes.shape[1],
            "num_data": len(split),
        }
        return {
            "text": f"{len(split)} codes of {codes.shape[1]} dimensions; {axes[0]}, {axes[1]}",
            "result": result,
        }

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw the codes."""
        found = record["result"]
        coloured = "" if found["labels"] is None else f", coloured by {len(set(found['labels']))} labels"
        how = "" if found["z_dim"] <= 2 else " projected on their first two principal axes"
        return [
            Drawing(
                "codes",
                f"Scatter plot of the codes of {found['num_data']} held-out data{how}{coloured}, over draws "
                "of the prior.",
                f"Posterior means of {found['num_data']} held-out data, {found['z_dim']} dimensions{how}; "
                "grey: draws of the prior.",
                partial(drawn.code_scatter, found),
            )
        ]


class Likelihood(_Part):
    """The number that is certified."""

    name = "likelihood"
    heading = "likelihood"
    about = "importance-weighted bounds on log p(x), with k-hats"
    sizes: ClassVar[Mapping[str, Size]] = {
        "data": Size(300, 2000, 10_000, 100),
        "particles": Size(1000, 2000, 5000, 100),
    }

    def rows(self, sizes: Sizes) -> float:
        """Score every particle."""
        return sizes["data"] * sizes["particles"]

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Estimate under every proposal; a density along a chain has the nested bound beside it."""
        from .jobs import better_bound, compare_bounds

        split = job.test(sizes["data"])
        options: Any = {
            "num_particles": sizes["particles"],
            "seed": job.wanted.seed,
            "progress": job.progress,
        }
        model, proposals = job.run.model, proposals_of(job)
        found = {name: log_likelihood(model, guide, split, **options) for name, guide in proposals.items()}
        best = max(found, key=lambda name: found[name].mean)
        lines, said, nested = [str(estimate) for estimate in found.values()], [], None
        if found[best].num_steps is not None:
            bound = nested_likelihood(model, proposals[best], split, **options)
            nested = bound.to_dict()
            lines.append(str(bound))
            said.append(_sentence(compare_bounds(found[best], bound)))
        if len(found) > 1:
            said.append(_sentence(better_bound(*found.values())))
        said.append(_sentence(found[best].khat_sentence))
        estimates = {name: estimate.to_dict() for name, estimate in found.items()}
        result = {"estimates": estimates, "best": best, "nested": nested, "said": said}
        return {"text": "\n\n".join([*lines, *said[:-1]]), "result": result}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw the k-hats."""
        found = record["result"]["estimates"][record["result"]["best"]]
        khats = [khat for khat in found["per_datum"]["pareto_k"] if khat is not None]
        if not khats:
            return []
        share = 100 * found["khat_share"]
        return [
            Drawing(
                "k-hat",
                f"Histogram of the Pareto k-hat of {len(khats)} data; {share:.1f} % lie above the threshold "
                f"{found['khat_threshold']:.2f}.",
                "Tail of the importance weights, datum by datum: where k-hat is above "
                f"{found['khat_threshold']:.2f} ({share:.1f} %, red) the bound holds, but is not reliably "
                "tight.",
                partial(drawn.khat_histogram, khats, found["khat_threshold"]),
            )
        ]


_ANNEALING = {"data": Size(32, 100, 300, 8), "steps": Size(200, 500, 1000, 50)}


class Annealing(_Part):
    """A lower bound that a better posterior would give."""

    name = "annealing"
    heading = "annealed bound"
    about = "what annealed importance sampling adds to the importance-weighted bound"
    sizes: ClassVar[Mapping[str, Size]] = {**_ANNEALING, "particles": Size(1000, 2000, 5000, 100)}

    def applies(self, job: Job) -> str | None:
        """Need gradients of the joint density in the latents."""
        return _no_gradient(job)

    def rows(self, sizes: Sizes) -> float:
        """Take the gradient of every chain at every step, and the other bound on the same data."""
        return _annealing_rows(sizes) + sizes["data"] * sizes["particles"]

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Anneal from the proposal of the best bound, and compare datum by datum."""
        split, guide = job.test(sizes["data"]), _best_guide(job)
        options: Any = {"seed": job.wanted.seed, "progress": job.progress}
        direct = log_likelihood(job.run.model, guide, split, num_particles=sizes["particles"], **options)
        found = annealed_likelihood(
            job.run.model,
            guide,
            split,
            num_chains=_CHAINS,
            num_steps=sizes["steps"],
            num_leapfrog=_LEAPFROG,
            **options,
        )
        gain = _mean(found.log_prob - direct.log_prob, job.wanted.seed)
        loss = _mean(direct.elbo_values - direct.log_prob, job.wanted.seed)
        said = (
            f"On the same {len(split)} data the annealed bound is {abs(gain.value):.3f} nats "
            f"{'above' if gain.value >= 0 else 'below'} the one of {sizes['particles']} particles (95 % "
            f"interval of the difference {gain.low:+.3f} to {gain.high:+.3f}); both are lower bounds, so "
            "that the higher one counts."
        )
        result = {
            "gain": vars(gain),
            "elbo": vars(loss),
            "annealed": found.to_dict(),
            "direct": direct.to_dict(),
            "num_data": len(split),
            "said": [said],
        }
        return {"text": f"{found}\n\n{said}", "result": result}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw the three bounds."""
        found = record["result"]
        particles = found["direct"]["num_particles"]
        rungs = [
            ("ELBO", *(found["elbo"][key] for key in ("value", "low", "high"))),
            (f"IWAE-{particles}", 0.0, 0.0, 0.0),
            (
                f"AIS, {found['annealed']['num_steps']} steps",
                *(found["gain"][key] for key in ("value", "low", "high")),
            ),
        ]
        said = ", ".join(f"{name} {value:+.2f}" for name, value, *_ in rungs)
        return [
            Drawing(
                "bounds",
                f"Lower bounds of {found['num_data']} data, in nats from the importance-weighted one: "
                f"{said}.",
                f"Bounds on log p(x) of the same {found['num_data']} data, with 95 % intervals of the "
                "difference.",
                partial(drawn.bound_ladder, rungs),
            )
        ]


class Bidirectional(_Part):
    """How far below log p(x) that bound is, on data of the model's own."""

    name = "bidirectional"
    heading = "bidirectional Monte Carlo"
    about = "log p(x) of data that the model makes, enclosed from both sides"
    sizes: ClassVar[Mapping[str, Size]] = _ANNEALING

    def applies(self, job: Job) -> str | None:
        """Need gradients of the joint density in the latents."""
        return _no_gradient(job)

    def rows(self, sizes: Sizes) -> float:
        """Anneal there and back."""
        return 2 * _annealing_rows(sizes)

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Measure the gap of the annealed bound, with its own steps where that is there."""
        annealed = job.found("annealing")
        steps = sizes["steps"] if annealed is None else annealed["annealed"]["num_steps"]
        found = bidirectional(
            job.run.model,
            _best_guide(job),
            job.test(sizes["data"]),
            num_chains=_CHAINS,
            num_steps=steps,
            num_leapfrog=_LEAPFROG,
            seed=job.wanted.seed,
            progress=job.progress,
        )
        said = _sentence(str(found))
        return {"text": said, "result": found.to_dict() | {"said": [said]}}


class Gaps(_Part):
    """What the guide loses, and to which of its parts."""

    name = "gaps"
    heading = "where the nats go"
    about = "what amortisation and the posterior's family lose, and which part to exchange"
    sizes: ClassVar[Mapping[str, Size]] = {
        "data": Size(32, 100, 300, 8),
        "steps": Size(200, 300, 300, 100),
        "particles": Size(500, 1000, 2000, 100),
    }

    def rows(self, sizes: Sizes) -> float:
        """Climb twice with 16 draws a step, and score what was found."""
        return sizes["data"] * (2 * _GRADIENT * 16 * sizes["steps"] + 4 * sizes["particles"])

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Optimise datum by datum."""
        found = inference_gaps(
            *job.run.program,
            job.test(),
            num_data=sizes["data"],
            num_particles=sizes["particles"],
            num_steps=sizes["steps"],
            seed=job.wanted.seed,
            progress=job.progress,
        )
        return {"text": str(found), "result": found.to_dict()}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw the losses."""
        found = record["result"]
        intervals = found["intervals"]
        lost = ", ".join(
            f"{name} {intervals[name]['value']:.2f}"
            for name in ("amortisation", "family")
            if name in intervals
        )
        return [
            Drawing(
                "gaps",
                f"Bars of the nats per datum that are lost: {lost}.",
                f"Losses between the ELBO and {found['reference_name']} on {found['num_data']} data, with 95 "
                "% intervals.",
                partial(drawn.gap_bars, intervals),
            )
        ]


class Calibration(_Part):
    """Ranks and coverage where the truth is known."""

    name = "calibration"
    heading = "is the posterior calibrated"
    about = "ranks of the latents that made simulated data, and coverage of intervals"
    sizes: ClassVar[Mapping[str, Size]] = {"simulations": Size(300, 1000, 3000, 100)}

    def rows(self, sizes: Sizes) -> float:
        """Draw and score for each simulation."""
        return sizes["simulations"] * _DRAWS

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Simulate data and rank."""
        found = simulation_based_calibration(
            *job.run.program,
            job.test(),
            num_simulations=sizes["simulations"],
            num_draws=_DRAWS,
            seed=job.wanted.seed,
            progress=job.progress,
        )
        return {"text": _sentence(str(found)), "result": _ranks(found)}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw the histograms that depart most, and the coverage."""
        found = record["result"]
        coverage = found["coverage"]
        middle = min(range(len(coverage["nominal"])), key=lambda i: abs(coverage["nominal"][i] - 0.9))
        level, share = coverage["nominal"][middle], coverage["pooled"][middle]
        return [
            _histograms(
                found, "ranks of the truth", "the latents that made simulated data among draws of the guide"
            ),
            Drawing(
                "coverage",
                "Curve of the coverage of central intervals by their level, beside the diagonal: intervals "
                f"of level {level:.2f} hold the truth in {100 * share:.1f} % of the simulations.",
                "How often central credible intervals hold the latent that made the data, pooled over the "
                "latents; grey: where a calibrated curve of one latent lies with probability 0.95.",
                partial(drawn.coverage_curve, coverage),
            ),
        ]


class Aggregate(_Part):
    """Ranks of what real data are encoded as."""

    name = "aggregate"
    heading = "codes of real data among draws of the prior"
    about = "ranks of codes of real data among draws of the prior"
    sizes: ClassVar[Mapping[str, Size]] = {"data": Size(500, 2000, 5000, 100)}

    def rows(self, sizes: Sizes) -> float:
        """Run the model to its end for every draw."""
        return sizes["data"] * (_DRAWS + 1)

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Rank real codes."""
        found = aggregate_calibration(
            *job.run.program,
            job.test(),
            num_data=sizes["data"],
            num_draws=_DRAWS,
            seed=job.wanted.seed,
            progress=job.progress,
        )
        return {"text": _sentence(str(found)), "result": _ranks(found)}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw the histograms that depart most."""
        found = record["result"]
        return [_histograms(found, "ranks of codes", "codes of real data among draws of the prior")]


class Predictive(_Part):
    """What the model's data have in common with real ones."""

    name = "predictive"
    heading = "predictive checks"
    about = "statistics of the data among those of replicated data"
    sizes: ClassVar[Mapping[str, Size]] = {"data": Size(200, 500, 1000, 40)}

    def rows(self, sizes: Sizes) -> float:
        """Replicate the data twice."""
        return 2 * sizes["data"] * _REPLICATES

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Replicate from posterior and prior predictive."""
        found = predictive_check(
            *job.run.program,
            job.test(),
            num_replicates=_REPLICATES,
            num_data=sizes["data"],
            seed=job.wanted.seed,
            progress=job.progress,
        )
        said = _sentence(str(found).replace(". prior predictive", ". Prior predictive"))
        return {"text": f"{found.to_markdown()}\n\n{said}", "result": found.to_dict()}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw statistics beside their replications, for both sources."""
        found = record["result"]
        drawings: list[Drawing | Raster] = []
        for source in ("posterior", "prior"):
            wrong = found["misfits"][source]
            said = f"misfits: {', '.join(wrong)}" if wrong else "no misfit found"
            drawings.append(
                Drawing(
                    f"{source} predictive",
                    f"Statistics of the data beside 95 % intervals of {found['num_replicates']} replications "
                    f"from the {source} predictive; {said}.",
                    f"Replications from the {source} predictive: {said}.",
                    partial(drawn.predictive_dots, found[source], wrong, f"{source} predictive"),
                )
            )
        return drawings


class Match(_Part):
    """Prior and aggregate posterior, from draws alone."""

    name = "match"
    heading = "prior match and information"
    about = "prior against codes: tests, distances, holes, marginals, information, activity"
    sizes: ClassVar[Mapping[str, Size]] = {"data": Size(1000, 2000, 5000, 100)}

    def rows(self, sizes: Sizes) -> float:
        """Draw from both and encode."""
        return 40 * sizes["data"]

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Compare draws."""
        found = prior_match(
            *job.run.program, job.test(sizes["data"]), seed=job.wanted.seed, progress=job.progress
        )
        return {"text": found.to_markdown(), "result": found.to_dict()}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw marginals and information."""
        found = record["result"]
        marginals, information = found["marginals"], found["information"]
        worst = marginals["histograms"]["shown"][0]
        return [
            Drawing(
                "marginals",
                "Histograms of codes and of draws of the prior, dimension by dimension, the largest "
                f"difference in dimension {worst}.",
                "Codes of held-out data (filled) and draws of the prior (line) in the dimensions that "
                "differ most.",
                partial(drawn.marginal_histograms, marginals["histograms"]),
            ),
            Drawing(
                "marginal KL",
                f"Bars of the divergence of each of {len(marginals['kl']['high'])} dimensions, the largest "
                f"{max(marginals['kl']['high']):.3f} nats.",
                "Divergence of each marginal from the prior's, between its two bounds.",
                partial(drawn.marginal_bars, marginals["kl"]),
            ),
            Drawing(
                "information",
                f"Bars of bounds on the information of the latents, from {information['low']['value']:.2f} "
                "nats.",
                "Bounds on the information of the latents about the data, and the rate, with 95 % intervals.",
                partial(drawn.information_bars, information),
            ),
        ]


class Outside(_Part):
    """How strange data from elsewhere are, in every way that they allow."""

    name = "ood"
    heading = "data from elsewhere"
    about = "scores of strangeness, AUROC, conformal tests; needs --ood"
    sizes: ClassVar[Mapping[str, Size]] = {
        "data": Size(300, 1000, 2000, 100),
        "particles": Size(100, 200, 500, 30),
        "regret": Size(0, 30, 60, 0),
    }

    def applies(self, job: Job) -> str | None:
        """Need other data."""
        return None if job.wanted.ood else "no data from elsewhere were named: --ood"

    def asked(self, wanted: Wanted) -> dict[str, Any]:
        """Depend on what is scored."""
        return {"seed": wanted.seed, "ood": list(wanted.ood), "calibration": wanted.calibration}

    def rows(self, sizes: Sizes) -> float:
        """Score training, calibration, test and other data."""
        return sizes["data"] * (4 * sizes["particles"] + 2 * _GRADIENT * 16 * sizes["regret"])

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Score everything in every way that the data allow, and tell apart."""
        run, wanted, programs = job.run, job.wanted, job.run.program
        outside = {
            name: spread(load_outside(run, name, job.root, job.download).test, sizes["data"])
            for name in wanted.ood
        }
        test = job.test(sizes["data"])
        which: list[OODScore] = ["log_prob", "elbo", "log_p", "kl", "typicality", "mahalanobis"]
        notes = []
        try:
            pixel_levels(test[:1])
            which.append("complexity")
        except ValueError as error:
            notes.append(f"No score less complexity: {error}.")
        if sizes["regret"]:
            which.append("regret")
        labels = None
        if getattr(programs.model, "conditional", False) and test.y is not None:
            labels = label_candidates(test.y, LABELS)
        options: Any = {
            "num_particles": sizes["particles"],
            "labels": labels,
            "progress": job.progress,
        }
        training = spread(run.data.train, sizes["data"])
        known = familiar_data(*programs, training, which=which, seed=wanted.seed, **options)

        def score(split: Split, stream: int) -> Any:
            return ood_scores(
                *programs,
                split,
                which=which,
                training=known,
                num_steps=max(2, sizes["regret"]),
                seed=wanted.seed + stream,
                **options,
            )

        inside, calibration = score(test, 0), None
        if wanted.calibration == "valid" or (wanted.calibration is None and "valid" in run.data.parts):
            calibration = score(spread(run.data.valid, sizes["data"]), 1)
        found: dict[str, OODDetection] = {}
        for i, (name, split) in enumerate(outside.items()):
            found[name] = detect(inside, score(split, 2 + i), calibration, seed=wanted.seed)
        sections = [[name, table.to_markdown()] for name, table in found.items()]
        text = "\n\n".join(f"inside against {name}\n\n{table}" for name, table in sections)
        tables = {name: table.to_dict() for name, table in found.items()}
        said = "\n\n".join([text, *notes])
        return {"text": said, "result": {"sections": sections, "notes": notes, "tables": tables}}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw the areas."""
        tables = {name: table["detectors"] for name, table in record["result"]["tables"].items()}
        best = "; ".join(
            f"{name}: at best {max(of['auroc']['value'] for of in table.values()):.3f}"
            for name, table in tables.items()
        )
        return [
            Drawing(
                "AUROC",
                f"Areas under the ROC curve of every score with intervals. {best}.",
                "Area under the ROC curve of every score, with 95 % intervals; larger scores are stranger.",
                partial(drawn.auroc_dots, tables),
            )
        ]


class Quality(_Part):
    """Samples among real data."""

    name = "quality"
    heading = "sample quality"
    about = "samples against held-out data in the features of a classifier trained on the same data"
    sizes: ClassVar[Mapping[str, Size]] = {
        "samples": Size(1000, 5000, 10_000, 100),
        "training": Size(4000, 20_000, 60_000, 1000),
    }

    def applies(self, job: Job) -> str | None:
        """Need labels for the classifier."""
        if job.run.data.train.y is None:
            return (
                "the data have no labels to train a classifier with, whose features samples are compared in"
            )
        return None

    def rows(self, sizes: Sizes) -> float:
        """Sample; the classifier is a small network of its own."""
        return sizes["samples"]

    def run(self, job: Job, sizes: Sizes) -> dict[str, Any]:
        """Train a classifier on part of the data, and compare in its features."""
        data = job.run.data
        train = spread(data.train, sizes["training"])
        valid = spread(data.valid, sizes["training"]) if "valid" in data.parts else None
        device = device_of(*job.run.program)
        judge = fit_classifier(
            train.to(device),
            None if valid is None else valid.to(device),
            seed=job.wanted.seed,
            progress=job.progress,
        )
        found = sample_quality(
            job.run.model,
            data,
            features=judge.features,
            num_samples=sizes["samples"],
            seed=job.wanted.seed,
            progress=job.progress,
        )
        score = judge.accuracy(data.test)
        about = (
            f"The features are those of a classifier of {len(train)} training data, which is right about "
            f"{100 * score.overall:.1f} % of the labels of test data."
        )
        # It was made here and given there.
        table = found.to_markdown().replace(found.extractor, "features of a classifier")
        return {"text": f"{table}\n\n{about}", "result": found.to_dict() | {"classifier": about}}

    def drawings(self, record: Record) -> list[Drawing | Raster]:
        """Draw precision and its kin."""
        found = record["result"]
        ours = found["precision_recall"]
        said = ", ".join(
            f"{name} {ours[name]:.2f}" for name in ("precision", "recall", "density", "coverage")
        )
        return [
            Drawing(
                "quality",
                f"Bars of samples among held-out data: {said}; training data beside them.",
                f"{found['num_samples']} {found['shown']} of the model, and as many training data, among as "
                "many held-out data.",
                partial(drawn.quality_bars, found),
            )
        ]


_ALL: tuple[Part, ...] = (
    Latents(),
    Pictures(),
    Codes(),
    Likelihood(),
    Annealing(),
    Bidirectional(),
    Gaps(),
    Calibration(),
    Aggregate(),
    Predictive(),
    Match(),
    Outside(),
    Quality(),
)

PARTS: dict[str, Part] = {part.name: part for part in _ALL}
"""The parts by name, in their order: what is cheap and what others need comes first."""


def _sentence(text: str) -> str:
    """Begin with a capital and end with a full stop, but for what begins with a symbol."""
    begins = text[:1] if text.startswith("k-hat") else text[:1].upper()
    return begins + text[1:] + ("" if text.endswith(".") else ".")


def _no_gradient(job: Job) -> str | None:
    if isinstance(getattr(job.run.model, "prior", None), DiffusionPrior):
        return "p(u) is a diffusion, whose density is only estimated: it cannot be annealed"
    return None


def _best_guide(job: Job) -> Any:
    """The proposal of the better bound, where one was estimated; the guide itself else."""
    likelihood = job.found("likelihood")
    return proposals_of(job)["own" if likelihood is None else likelihood["best"]]


def _annealing_rows(sizes: Sizes) -> float:
    return _GRADIENT * _CHAINS * sizes["data"] * sizes["steps"] * _LEAPFROG


def _mean(values: Tensor, seed: int) -> Interval:
    (interval,) = bootstrap_intervals(lambda i: values[i].mean(), len(values), num_bootstrap=1000, seed=seed)
    return interval


def _ranks(found: RankCalibration) -> dict[str, Any]:
    """The record of ranks without the curves of every quantity, and with the histograms that depart most."""
    record = found.to_dict()
    quantities = record["quantities"]
    latents = sorted(quantities[:-1], key=lambda quantity: quantity["p_value"])[:_MOST_QUANTITIES]
    record |= {"quantities": [*latents, quantities[-1]], "num_quantities": len(quantities)}
    if record["coverage"] is not None:
        keep = ("nominal", "pooled", "pooled_low", "pooled_high", "band_low", "band_high")
        record["coverage"] = {name: record["coverage"][name] for name in keep}
    return record


def _histograms(found: Record, title: str, what: str) -> Drawing:
    """Rank histograms of the quantity that all hang on, and of those that depart most."""
    quantities = [found["quantities"][-1], *found["quantities"][:-1]]
    verdict = "no departure found" if found["holds"] else "they depart from uniform ranks"
    low, high = found["histogram_band"]
    return Drawing(
        title,
        f"Rank histograms with bands: {what}; {verdict}, p = {found['p_value']:.2g} over "
        f"{found['num_quantities']} quantities.",
        f"Ranks of {what}; grey: what holds all bins of a calibrated histogram with probability 0.95. p = "
        f"{found['p_value']:.2g} over {found['num_quantities']} quantities.",
        partial(drawn.rank_histograms, quantities, low, high, title),
    )


def _png(pixels: Any) -> str:
    """An RGB array as the base 64 text of a PNG file."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, pixels, format="png", metadata={"Software": "pvae"})
    return base64.b64encode(file.getvalue()).decode()


def _plane(x: Tensor) -> list[list[float]]:
    """The first two numbers of each datum; the second is zero where there is one alone."""
    flat = x.detach().cpu().double().flatten(1)
    if flat.shape[1] == 1:
        flat = torch.cat((flat, torch.zeros_like(flat)), 1)
    return _rounded(flat[:, :2])


def _projected(codes: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Codes and draws of the prior in the plane of the codes' largest variance; names of its axes."""
    if codes.shape[1] == 1:
        zero = torch.zeros_like(codes)
        return torch.cat((codes, zero), 1), torch.cat((prior, torch.zeros_like(prior)), 1), ["z₁", ""]
    if codes.shape[1] == 2:
        return codes, prior, ["z₁", "z₂"]
    middle = codes.mean(0)
    *_, scales, axes = torch.linalg.svd(codes - middle, full_matrices=False)
    # The sign of an axis means nothing: its largest number is positive.
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    shares = (scales.square() / scales.square().sum().clamp(min=1e-300)).tolist()
    names = [f"principal axis {i + 1}, {100 * shares[i]:.0f} % of the variance" for i in range(2)]
    return (codes - middle) @ axes.T, (prior - middle) @ axes.T, names


def _labels(split: Split) -> list[str] | None:
    """Names of the classes of some data, where they have classes."""
    if split.y is None or split.y.ndim != 1 or split.y.is_floating_point():
        return None
    names: Sequence[str] | None = split.class_names
    return [str(i) if names is None else str(names[i]) for i in split.y.tolist()]


def _rounded(points: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in points.detach().cpu().double().tolist()]
