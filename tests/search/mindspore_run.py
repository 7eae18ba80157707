"""Lets MindSpore slice a checkpoint by an emitted strategy, and saves what each rank got.

python mindspore_run.py FOLDER   reads shapes.json and out/, writes rank<n>.npz
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import mindspore as ms
import numpy as np


def main() -> None:
    """Whole weights hold their own element numbers."""
    folder = Path(sys.argv[1])
    whole = [
        {
            "name": name,
            "data": ms.Tensor(np.arange(math.prod(shape), dtype=np.float32).reshape(shape)),
        }
        for name, shape in json.loads((folder / "shapes.json").read_text("utf-8")).items()
    ]
    ms.save_checkpoint(whole, str(folder / "whole.ckpt"))
    sys.argv = ["slice.py", str(folder / "whole.ckpt"), str(folder / "sliced")]
    runpy.run_path(str(folder / "out" / "slice.py"), run_name="__main__")
    for target in sorted((folder / "sliced").iterdir()):
        parts = ms.load_checkpoint(str(target / "model.ckpt"))
        arrays = {name: part.asnumpy() for name, part in parts.items()}
        np.savez(folder / f"{target.name.replace('_', '')}.npz", **arrays)


if __name__ == "__main__":
    main()
