"""The process that builds one engine: a request as JSON on its standard input, the result as a JSON file.

It sets the backend before it imports polygraphy, because polygraphy chooses the backend at import.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RTX = "tensorrt-rtx"


def main() -> None:
    request = json.load(sys.stdin)
    if request["backend"] == RTX:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    os.environ["POLYGRAPHY_AUTOINSTALL_DEPS"] = "0"
    Path(request["result"]).write_text(json.dumps(answer(request)))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a request: `layers` and `unused` inputs of the network, or an `error` and its profile.

    If the error is empty, the builder failed and its message is in the log.
    """
    from polygraphy.backend.trt import NetworkFromOnnxPath
    from polygraphy.exception import PolygraphyException

    try:
        parts = NetworkFromOnnxPath(request["onnx"], strongly_typed=True)()
    except PolygraphyException as error:
        return {"error": parser_error(request["onnx"]) or str(error)}
    facts = inspected(parts[1])
    if facts["unused"]:
        return facts
    if build(parts, request, request["profiles"]):
        return facts
    for number, profile in enumerate(request["profiles"]):  # find the one that fails
        parts = NetworkFromOnnxPath(request["onnx"], strongly_typed=True)()
        if not build(parts, request, [profile]):
            return {"error": "", "profile": number}
    return {"error": ""}


def build(parts: tuple[Any, ...], request: dict[str, Any], profiles: Sequence[dict[str, Any]]) -> bool:
    """Write the engine. Returns False if the builder fails; the reason is then in its log."""
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, Profile
    from polygraphy.exception import PolygraphyException

    made = []
    for shapes in profiles:
        profile = Profile()
        for name, (low, best, high) in shapes.items():
            profile.add(name, low, best, high)
        made.append(profile)
    cache = None if request["backend"] == RTX else request["timing_cache"]  # TensorRT-RTX does no timing
    config = CreateConfig(profiles=made, load_timing_cache=cache)
    try:
        engine = EngineBytesFromNetwork(parts, configured(config, request["capability"]), save_timing_cache=cache)()
    except PolygraphyException:
        return False
    Path(request["engine"]).write_bytes(bytes(engine))
    return True


def configured(config: Any, capability: str) -> Any:
    """The config, for one compute capability if one is given."""
    if not capability:
        return config
    from polygraphy.backend.trt import PostprocessConfig
    from polygraphy.mod.trt_importer import lazy_import_trt

    known = lazy_import_trt().ComputeCapability.__members__
    target = known[f"SM{capability.replace('.', '')}"]

    def choose(builder: Any, network: Any, config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)

    return PostprocessConfig(config, func=choose)


def inspected(network: Any) -> dict[str, Any]:
    """How many layers a network has, and which of its inputs none of them reads."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    read = {value.name for layer in layers for i in range(layer.num_inputs) if (value := layer.get_input(i))}
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    return {"layers": len(layers), "unused": [name for name in names if name not in read]}


def parser_error(path: str) -> str | None:
    """The parser's first error for an ONNX file: node, op and reason."""
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt = lazy_import_trt()
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parser.parse_from_file(path)
    if not parser.num_errors:
        return None
    error = parser.get_error(0)
    return f"node '{error.node_name()}', op {error.node_operator()}: {' '.join(error.desc().split())}"


if __name__ == "__main__":
    main()
