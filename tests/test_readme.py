"""The README shows the tree as it is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_module_is_in_the_tree() -> None:
    tree = (ROOT / "README.md").read_text().rpartition("```\npyproject.toml")[2]
    for package in ("crds/kompressor_api", "operator/kompressor_operator", "worker/kompressor_worker"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if file.name not in ("__init__.py", "__main__.py"):
                assert f"\n  {file.relative_to(ROOT / package)} " in tree, f"README.md does not show {file.relative_to(ROOT)}"
