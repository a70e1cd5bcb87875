"""Build the wheel and check that it holds the linked packages, assets and templates, and nothing beside `dcconvert`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = [
    "dcconvert/__init__.py",
    "dcconvert/py.typed",
    "dcconvert/passes/__init__.py",
    "dcconvert/export/__init__.py",
]
DATA = ["dcconvert/assets", "dcconvert/report/templates"]  # folders of files that are no Python


def build(folder: Path) -> list[str]:
    """Build the wheel into `folder`; return the names of its files."""
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack files that are gone from the sources
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    with zipfile.ZipFile(next(folder.glob("dcconvert-*.whl"))) as wheel:
        return wheel.namelist()


def main() -> None:
    """Exit with one line for everything missing or superfluous."""
    with tempfile.TemporaryDirectory() as folder:
        names = build(Path(folder))
    files = [file for folder in DATA for file in (ROOT / folder).glob("*") if file.is_file()]
    data = [file.relative_to(ROOT).as_posix() for file in files]
    missing = [name for name in REQUIRED + data if name not in names]
    strangers = [name for name in names if not name.startswith(("dcconvert/", "dcconvert-"))]
    if missing or strangers:
        sys.exit(f"wheel: missing {missing}, not expected {strangers}")
    print(f"wheel: {len(names)} files, all of dcconvert, dcconvert.passes and dcconvert.export there")


if __name__ == "__main__":
    main()
