"""Serve a page that samples a bundle of mode steps in the browser, beside the original.

    npm --prefix examples install --no-save onnxruntime-web
    python examples/web/serve.py out            # then open http://localhost:8000

The page computes everything itself, with onnxruntime-web; this program only hands out files.
"""

import argparse
import contextlib
import http.server
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
ORT = HERE.parent / "node_modules" / "onnxruntime-web" / "dist"


class Files(http.server.SimpleHTTPRequestHandler):
    """/bundle/ is the bundle, /ort/ is onnxruntime-web, everything else lies beside the page."""

    extensions_map: ClassVar = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def __init__(self, *args, bundle, **options):
        self.roots = {"bundle": bundle, "ort": ORT, "examples": HERE.parent}
        super().__init__(*args, **options)

    def translate_path(self, path):
        first, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
        root, inside = (self.roots[first], rest) if first in self.roots else (HERE, f"{first}/{rest}".rstrip("/"))
        target = (root / inside).resolve()
        return str(target if target.is_relative_to(root.resolve()) else root / "not-found")

    def log_message(self, *_):
        pass


def server(bundle, port=8000):
    """A server on this machine only; port 0 takes a free one."""
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(Files, bundle=Path(bundle)))


def main():
    parser = argparse.ArgumentParser(description="Serve a page that samples a bundle in the browser.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not (args.bundle / "run.json").is_file():
        parser.error(f"{args.bundle} is not a bundle in mode steps: it has no run.json")
    if not ORT.is_dir():
        parser.error("onnxruntime-web is missing: npm --prefix examples install --no-save onnxruntime-web")
    print(f"Open http://localhost:{args.port} (Ctrl-C to stop)")
    with contextlib.suppress(KeyboardInterrupt):
        server(args.bundle, args.port).serve_forever()


if __name__ == "__main__":
    main()
