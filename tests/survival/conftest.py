"""One process for all tests here that forks the commands they run."""

from collections.abc import Iterator

import pytest

from .worker import Worker


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("worker")) as worker:
        yield worker
