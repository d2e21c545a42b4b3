"""Contenders in turn, in one process: how everything here is timed."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import pvae

__all__ = ["Row", "clock_of", "interleave", "left_out", "machine_of", "row", "sentence"]

Row = dict[str, object]


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time contenders in turn, every second round backwards, so that all see the same machine.

    Args:
        contenders: What to run, by name; each runs once untimed first.
        rounds: Number of rounds.
        clock: Returns seconds.

    Returns:
        Seconds of each round, by name.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            start = clock()
            contenders[name]()
            seconds[name].append(clock() - start)
    return seconds


def row(
    benchmark: str,
    ours: str,
    yardstick: str,
    seconds: dict[str, list[float]],
    units: int,
    target: float | None,
    syncs: int | None,
) -> Row:
    ratios = [a / b for a, b in zip(seconds[ours], seconds[yardstick], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "benchmark": benchmark,
        "ours": ours,
        "yardstick": yardstick,
        "ours_ms": 1e3 * statistics.median(seconds[ours]) / units,
        "yardstick_ms": 1e3 * statistics.median(seconds[yardstick]) / units,
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "target": target,
        "rounds": len(ratios),
        "syncs": syncs,
    }


def left_out(benchmark: str, ours: str, yardstick: str, reason: str) -> Row:
    """A row of what could not be timed, and why."""
    numbers = ("ours_ms", "yardstick_ms", "ratio", "low", "high", "target")
    return {
        "benchmark": benchmark,
        "ours": ours,
        "yardstick": yardstick,
        **dict.fromkeys(numbers),
        "rounds": 0,
        "syncs": None,
        "note": f"left out: {reason}",
    }


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU time, which a busy machine disturbs least; on another device the time until it is done."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronised


def machine_of(device: torch.device) -> Row:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "clock": "process CPU time" if device.type == "cpu" else "wall time, synchronised",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pvae": pvae.__version__,
    }


def _processor() -> str:
    """Name of the CPU, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def sentence(machine: Row, rounds: int) -> str:
    """One line that says what a table was measured on."""
    return (
        f"{machine['device']}, {machine['threads']} thread(s); {machine['clock']}; {rounds} rounds; "
        f"torch {machine['torch']}, Python {machine['python']}, pvae {machine['pvae']}."
    )
