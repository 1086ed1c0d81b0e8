"""The table tests need nothing; the others share one real control plane without nodes, where pods are played by patching their status."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]  # kcj_builders.py, played_cluster.py: no packages in tests/

from played_cluster import namespace, operator, played  # noqa: E402

__all__ = ["namespace", "operator", "played"]
