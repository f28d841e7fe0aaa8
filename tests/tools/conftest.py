"""The tools are scripts that import each other by their bare names; those tested here want torch and Pillow."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
collect_ignore_glob = [] if find_spec("torch") and find_spec("PIL") else ["test_*.py"]
