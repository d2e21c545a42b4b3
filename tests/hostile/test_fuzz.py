"""The fuzzers, a few hundred examples of each; see :mod:`tests.hostile.fuzz` for more."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings

from .fuzz import TARGETS, prepare


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_mutated_is_read_or_refused_in_one_line(name: str) -> None:
    prepare()
    target, came = TARGETS[name], Counter[str]()
    profile = settings()
    few = settings(profile, max_examples=target.examples_in_ci) if profile.derandomize else profile

    @few
    @given(target.examples)
    def run(example: Any) -> None:
        came[target.check(example)] += 1

    run()
    # Neither is a test: one that refuses all, and one whose inputs are all sound.
    assert len(came) > 1, came
    assert min(count for _, count in came.most_common(2)) >= 5, came
