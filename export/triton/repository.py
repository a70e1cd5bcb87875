"""A model repository for NVIDIA Triton Inference Server: ONNX graphs, and the plan of a step as a Python model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import TensorProto

from dcconvert.export.bundle import GRAPH, Bundle
from dcconvert.export.disk.json_text import part_of_folder
from dcconvert.export.disk.onnx_files import onnx_parts
from dcconvert.export.engines.build import axis_sizes, full_buckets, read_graph
from dcconvert.export.files import MANIFEST, Kind, matches, new_folder, write_json
from dcconvert.export.triton.backend import IDLE_SECONDS, OUTPUTS
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import count_outputs
from dcconvert.passes.planning.layout import Bucket

RUNS = 64
MARK = "dcconvert.json"  # at the top of a repository; Triton looks at folders only
AGAIN = "convert the model again, or build its graphs again if they are for ort-cuda"
KINDS = {"gpu": "KIND_GPU", "cpu": "KIND_CPU"}
TYPES = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
}
MODEL_PY = '''"""The steps of {name}; its graphs are models of their own. Triton's Python needs dcconvert installed."""

from pathlib import Path

import triton_python_backend_utils

from dcconvert.export.triton.backend import Served


class TritonPythonModel:
    def initialize(self, args):
        self.served = Served(Path(__file__).parent, {name!r}, triton_python_backend_utils)

    def execute(self, requests):
        return self.served.execute(requests)
'''


def in_repository(mark: Any, path: str) -> bool:
    """Whether a relative path is that of a file that `export_triton` writes."""
    files = (
        "config.pbtxt",
        "1/model.onnx",
        "1/*.onnx.data",
        "1/model.py",
        f"1/{MANIFEST}",
        f"1/{GRAPH}",
        f"1/{OUTPUTS}",
    )
    return matches(path, [MARK, *(f"{name}/{file}" for name in map(str, mark["models"]) for file in files)])


REPOSITORY = Kind(
    "Triton model repository of dcconvert", MARK, lambda mark: isinstance(mark.get("models"), list), in_repository
)


class Word(str):
    """An enum value of a configuration, which is written without quotes."""


def export_triton(
    bundle: Bundle, target: Path, name: str, device: str = "gpu", force: bool = False, runs: int = RUNS
) -> Path:
    """Write a model repository with NAME and, for each graph of the bundle, NAME_GRAPH (`ModelSpec.graphs`).

    `runs`: how many sampling runs may be under way at a time. On a GPU the fp16 graphs are used if the bundle has them;
    returns the folder of the graphs. Raises UsageError if the target cannot be written or is not a repository of this
    kind.
    """
    if not bundle.model.method.plain_plan:
        raise UsageError(
            f"{bundle.folder} was made with method {bundle.model.method.name}, whose plan needs more than a "
            "schedule and scores: Triton repositories support the methods steps, carry, chunk and sparsedit"
        )
    source = bundle.onnx / "ort-cuda"
    source = source if device == "gpu" and source.is_dir() else bundle.onnx
    with new_folder(target, force, REPOSITORY, inputs=[bundle.folder]) as work:
        graphs = bundle.model.spec.graphs
        for graph in graphs:
            buckets = bundle.bucket_set.buckets if graph == "denoise" else full_buckets(bundle.bucket_set.buckets)
            write_onnx_model(work / f"{name}_{graph}", source / f"{graph}.onnx", buckets, device)
        write_plan_model(work / name, bundle, name, runs)
        write_json({"name": name, "models": [name, *(f"{name}_{graph}" for graph in graphs)]}, work / MARK)
    return source


def write_onnx_model(folder: Path, path: Path, buckets: Sequence[Bucket], device: str) -> None:
    """One ONNX graph. Packed tokens of all samples share an axis, so Triton must not batch: max_batch_size is 0."""
    graph = read_graph(path, AGAIN)
    (folder / "1").mkdir(parents=True)
    for part in onnx_parts(path):
        # The graph refers to its external data by name, so the name must not change.
        shutil.copy2(part, folder / "1" / ("model.onnx" if part == path else part.name))
    config = {
        "name": folder.name,
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "input": [tensor(value) for value in graph.input],
        "output": [tensor(value) for value in graph.output],
        "instance_group": [{"kind": Word(KINDS[device]), "count": 1}],
        "model_warmup": [warm_up(graph.input, bucket) for bucket in buckets],
    }
    (folder / "config.pbtxt").write_text(text(config))


def tensor(value: Any) -> dict[str, Any]:
    """Name, type and sizes of an input or output; -1 for a size that varies."""
    kind = value.type.tensor_type
    return {
        "name": value.name,
        "data_type": Word(TYPES[kind.elem_type]),
        "dims": [d.dim_value or -1 for d in kind.shape.dim],
    }


def warm_up(inputs: Sequence[Any], bucket: Bucket) -> dict[str, Any]:
    """Warm-up inputs in the shapes of a bucket: zeros, valid as indices, so that the first request does not wait."""
    axes = axis_sizes(bucket)
    zeros = {
        value.name: {
            "data_type": Word(TYPES[value.type.tensor_type.elem_type]),
            "dims": [axes[d.dim_param] if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim],
            "zero_data": True,
        }
        for value in inputs
    }
    return {"name": f"batch {bucket.batch}, {bucket.row_tokens} tokens", "batch_size": 1, "inputs": zeros}


def write_plan_model(folder: Path, bundle: Bundle, name: str, runs: int) -> None:
    """The model that clients call, on Triton's Python backend."""
    version = folder / "1"
    version.mkdir(parents=True)
    for part in (MANIFEST, GRAPH):
        shutil.copy2(part_of_folder(bundle.folder, part), version / part)
    spec = bundle.model.spec
    outputs = count_outputs(bundle.model.original_graph)
    write_json(outputs, version / OUTPUTS)
    (version / "model.py").write_text(MODEL_PY.format(name=name))
    step = read_graph(bundle.onnx / f"{'full' if spec.updates else 'denoise'}.onnx", AGAIN)
    config: dict[str, Any] = {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": [
            {
                "name": item.name,
                "data_type": Word(f"TYPE_{item.dtype.upper().replace('FLOAT', 'FP')}"),
                "dims": [-1, *item.shape] if item.batched else list(item.shape),
            }
            for item in spec.input_specs
            if item.dtype
        ],
        "output": [tensor(value) for value in step.output[:outputs]],
        "instance_group": [{"kind": Word("KIND_CPU"), "count": 1}],
    }
    if bundle.model.method.stateful:
        config["sequence_batching"] = sequences(runs)
    (folder / "config.pbtxt").write_text(text(config))


def sequences(most: int) -> dict[str, Any]:
    """A sampling run with a state is a sequence; `most` may be under way in one instance.

    There are no control inputs: one for the id would have a fixed type, and clients use numbers or strings as ids.
    """
    return {
        "max_sequence_idle_microseconds": math.ceil(IDLE_SECONDS * 1e6),
        "oldest": {"max_candidate_sequences": most},
    }


def text(message: Mapping[str, Any], depth: int = 0) -> str:
    """A message in protobuf's text format. Lists of messages are repeated fields; a mapping of messages under `inputs`
    is a map field."""
    lines = []
    pad = "  " * depth
    for field, value in message.items():
        if field == "inputs":
            value = [{"key": key, "value": entry} for key, entry in value.items()]
        entries = value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]
        for entry in entries:
            if isinstance(entry, Mapping):
                lines.append(f"{pad}{field} {{\n{text(entry, depth + 1)}{pad}}}\n")
            else:
                lines.append(f"{pad}{field}: {scalar(entry)}\n")
    return "".join(lines)


def scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(scalar, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Word):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
