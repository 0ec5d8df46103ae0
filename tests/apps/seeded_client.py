"""A whole client whose worker has reproducible coins and noise; only tests can start it (guarantee G11).

    python -m tests.apps.seeded_client HOME           what ``tacit client start`` does
    python -m tests.apps.seeded_client HOME worker    its worker

Its ledger is marked as a test ledger, and every report over it prints infinity.
"""

import dataclasses
import sys

import tacit
from clients import services
from tests.apps.seeded import SeededSources


def main(home: str, part: str = "start") -> int:
    """Runs one of the two."""
    if part == "worker":
        services.SecureSources = SeededSources
        return tacit.main(["client", "worker", "--home", home])
    parts_of = services.parts_of
    command = [sys.executable, "-m", "tests.apps.seeded_client", home, "worker"]
    services.parts_of = lambda places, **more: [
        dataclasses.replace(part, command=command) if part.name == "worker" else part
        for part in parts_of(places, **more)
    ]
    return tacit.main(["client", "start", "--home", home, "--json"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
