"""Every check of the project, from its root: `python -m tests [arguments for pytest]`.

Lint, format, types, layers, then the tests; all run even after one fails, and the exit code is 0
only when all pass. The tests come last, so that their own closing line ends the output.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def checks(pytest_arguments: list[str]) -> dict[str, list[str]]:
    """The commands by name, in the order they run."""
    python = sys.executable
    lint_imports = str(Path(python).parent / "lint-imports")  # it has no `python -m` form
    return {
        "lint": [python, "-m", "ruff", "check", "."],
        "format": [python, "-m", "ruff", "format", "--check", "."],
        "types": [python, "-m", "mypy"],
        "layers": [lint_imports, "--no-logo"],
        "tests": [python, "-m", "pytest", "-n", "auto", *pytest_arguments],
    }


def _passes(name: str, command: list[str], environment: Mapping[str, str]) -> bool:
    shown = shlex.join([Path(command[0]).name, *command[1:]])
    print(f"\n== {name}: {shown}", flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    except FileNotFoundError:
        install = "pip install -c tests/constraints.txt '.[dev,torch]'"
        print(f"{command[0]} is not installed; try {install}", file=sys.stderr)
        return False


def main(pytest_arguments: list[str]) -> int:
    """Run every check; 0 if all pass, 1 otherwise."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    commands = checks(pytest_arguments)
    failed = [name for name, line in commands.items() if not _passes(name, line, environment)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
