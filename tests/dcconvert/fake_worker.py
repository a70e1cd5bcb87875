"""A stand-in for the process that builds an engine: a script, started in the place of Python, that makes it at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

folder, request = Path(__file__).parent, json.load(sys.stdin)
orders = json.loads((folder / "orders.json").read_text())
done, onnx = folder / "done", Path(request["onnx"])
for part, reason in orders["refused"].items():
    if part in (onnx.parent.name, onnx.stem):
        Path(request["result"]).write_text(json.dumps({"error": reason}))
        sys.exit()
if onnx.stem != "probe":
    if orders["limit"] == len(done.read_text().split()):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)
    with done.open("a") as file:
        print(onnx.stem, file=file)
Path(request["engine"]).write_text(json.dumps([str(onnx), request["profiles"]]))
Path(request["result"]).write_text(json.dumps({"layers": 1, "unused": []}))
"""


class FakeWorker:
    """The script, and what it is told: which graphs to refuse, and when the user presses Ctrl-C."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.orders: dict[str, object] = {"refused": {}, "limit": None}
        (folder / "done").touch()
        self.script = folder / "python"
        self.script.write_text(f"#!{sys.executable} -IS\n{SCRIPT}")
        self.script.chmod(0o755)
        self.write()

    @property
    def done(self) -> list[str]:
        """The graphs that engines were built of so far."""
        return (self.folder / "done").read_text().split()

    def refuse(self, **reasons: str) -> None:
        """Refuse graphs, by their names or those of their folders, for these reasons; no others."""
        self.orders["refused"] = reasons
        self.write()

    def interrupt_at(self, limit: int | None) -> None:
        """An interrupt instead of the next engine once so many are built."""
        self.orders["limit"] = limit
        self.write()

    def write(self) -> None:
        (self.folder / "orders.json").write_text(json.dumps(self.orders))
