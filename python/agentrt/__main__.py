"""The ``agentrt`` command, also ``python -m agentrt``."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line and returns the exit status."""
    from agentrt.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
