"""`python -m bench.gate`, from anywhere and with nothing but a copy of this tree: `python bench/gpu_gate.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of bench/, which holds no package

from bench.gate.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
