"""All benchmarks, or those that are asked for."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pvae.inference.isolation import isolated_rng
from pvae.inference.threads import threads_set

from ..program import SpecError
from ..registry import nearest
from ..spec import recipes
from .alignment import time_alignment
from .evaluation import time_evaluation
from .flow_prior import time_flow_prior
from .ladder import time_ladder
from .peers import time_peers
from .posteriors import NETWORKS, time_posteriors
from .recipes import time_recipe
from .steps import CASES, time_steps
from .table import format_table
from .timing import Row, machine_of, sentence

__all__ = ["BENCHMARKS", "NAMED", "run_bench"]

_ENGINES = ("eager", "traced", "graph", "cuda_graph")
_ANYWHERE = _ENGINES[:3]

Timer = Callable[[torch.device, int, tuple[str, ...]], list[Row]]

#: What can be measured, by name, in the order in which it is.
BENCHMARKS: dict[str, Timer] = {
    **{name: partial(time_steps, name) for name in CASES},
    "evaluation": time_evaluation,
    "cvae-nf": time_flow_prior,
    **{name: partial(time_posteriors, name) for name in NETWORKS},
    "alignment": time_alignment,
    "ladder": time_ladder,
}

#: What is measured only where it is named, as it takes minutes: every recipe, and other libraries.
NAMED: dict[str, Timer] = {"peers": time_peers}

_RECIPES, _RECIPE = "recipes", "recipe:"


def run_bench(
    *,
    device: str,
    rounds: int,
    names: tuple[str, ...] | None,
    engines: tuple[str, ...] | None,
    threads: int,
    out: Path | None,
) -> list[Row]:
    """Measure every benchmark that is asked for.

    On a CPU the clock is the process's CPU time, elsewhere wall time of a synchronised device.

    Args:
        device: Where to run.
        rounds: Interleaved rounds; the order within a round is reversed each time.
        names: Benchmarks out of :data:`BENCHMARKS`, all of them if ``None``; ``"recipes"`` for every recipe,
            ``"recipe:NAME"`` for one, ``"peers"`` for other libraries.
        engines: Engines out of ``eager``, ``traced``, ``graph`` and, on a CUDA device, ``cuda_graph``; by
            default the first three for the step benchmarks, ``eager`` alone for recipes, whose compilations
            take a minute each, and ``eager`` and ``graph`` elsewhere.
        threads: Threads of torch on the CPU.
        out: JSON file for rows and machine; the table goes beside it as Markdown.

    Returns:
        One row per comparison: ``benchmark``, ``ours``, ``yardstick``, medians ``ours_ms`` and
        ``yardstick_ms`` (per step or evaluation), ``ratio`` (median of the rounds' ratios), its quartiles
        ``low`` and ``high``, ``target`` (``None`` where the design names none), ``rounds``, and ``syncs``
        (host synchronisations of one step; ``None`` for an evaluation). Rows of recipes and peers have a
        ``note``, and ``None`` for the numbers of what was left out.

    Raises:
        SpecError: For an unknown benchmark or engine, or numbers that are not positive.
    """
    timers = _timers(tuple(BENCHMARKS) if names is None else names)
    for engine in engines or ():
        if engine not in _ENGINES:
            raise SpecError(f"engine must be one of {', '.join(_ENGINES)}, got {engine!r}")
        if engine == "cuda_graph" and torch.device(device).type != "cuda":
            raise SpecError(f"engine 'cuda_graph' needs a CUDA device, got {device}")
    if rounds < 1 or threads < 1:
        raise SpecError(f"rounds and threads must be positive, got {rounds} and {threads}")
    place, rows = torch.device(device), []
    with threads_set(threads), isolated_rng(place, seed=0):
        for name, timer in timers.items():
            rows += timer(place, rounds, _by_default(name) if engines is None else engines)
        machine = machine_of(place)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        out.with_suffix(".md").write_text(f"{sentence(machine, rounds)}\n\n{format_table(rows)}\n")
    return rows


def _by_default(name: str) -> tuple[str, ...]:
    """Engines that a benchmark times if none is asked for."""
    if name in CASES:
        return _ANYWHERE
    return ("eager",) if name.startswith(_RECIPE) else ("eager", "graph")


def _timers(names: tuple[str, ...]) -> dict[str, Timer]:
    """What measures each of some benchmarks, every recipe under its own name.

    Raises:
        SpecError: If a name is unknown.
    """
    known, found = BENCHMARKS | NAMED, dict[str, Timer]()
    for name in names:
        if name == _RECIPES:
            found |= {f"{_RECIPE}{recipe}": partial(time_recipe, recipe) for recipe in recipes()}
        elif name.startswith(_RECIPE):
            recipe = name.removeprefix(_RECIPE)
            if recipe not in recipes():
                raise SpecError(f"there is no recipe '{recipe}'{nearest(recipe, recipes())}")
            found[name] = partial(time_recipe, recipe)
        elif name in known:
            found[name] = known[name]
        else:
            allowed = ", ".join([*known, _RECIPES, f"{_RECIPE}NAME"])
            raise SpecError(f"benchmark must be one of {allowed}, got {name!r}")
    return found
