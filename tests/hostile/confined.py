"""Statements run in a process that may take little more memory than its imports did."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["MEBIBYTES", "Outcome", "confined"]

MEBIBYTES = 400
"""What a statement may take beyond what is there after the imports."""

_RUNNER = """
import json, os, resource, sys
from pathlib import Path
{imports}
here = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
most = here + {mebibytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
outcomes = {{}}
for name, statement in json.loads(sys.stdin.read()).items():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        exec(statement)
        kind, text = "", ""
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
    outcomes[name] = [kind, text, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 2**10]
print(json.dumps(outcomes))
"""


class Outcome(NamedTuple):
    """What a statement came to.

    Attributes:
        kind: Name of the type of the exception; empty where there was none.
        text: Its message.
        grown: By how many mebibytes the largest memory of the process grew.
    """

    kind: str
    text: str
    grown: int


def confined(imports: str, statements: dict[str, str], mebibytes: int = MEBIBYTES) -> dict[str, Outcome]:
    """Run statements one after the other in a new process, each under the limit of address space.

    Args:
        imports: What stands before the limit.
        statements: What is run, by name.
        mebibytes: Address space beyond what the imports took.
    """
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER.format(imports=imports, mebibytes=mebibytes)],
        input=json.dumps(statements),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: Outcome(*found) for name, found in json.loads(done.stdout.splitlines()[-1]).items()}
