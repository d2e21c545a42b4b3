"""Profiles of the fuzzers: the same few examples every time, or many new ones."""

import tempfile
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

# What it caches of the characters there are belongs into no checkout.
set_hypothesis_home_dir(tempfile.gettempdir() + "/pvae-hypothesis")

_COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", derandomize=True, **_COMMON)
settings.register_profile("long", derandomize=False, max_examples=20_000, **_COMMON)
settings.load_profile("few")
