"""Writes what the pages take from the code: `python -m docs`, from the root of a clone.

The reference and the coefficients, from options, fields and data files; outputs, by running the
commands of their pages.
(Where shardplan is not installed: `PYTHONPATH=src python -m docs`.)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from docs import coefficients, reference
from docs.outputs import FILLED, filled, lay_out


def main() -> None:
    """Write all of it."""
    reference.PAGE.write_text(reference.reference(), encoding="utf-8")
    coefficients.PAGE.write_text(coefficients.coefficients(), encoding="utf-8")
    for page in FILLED:
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder))
            page.write_text(filled(page.read_text("utf-8"), Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
