"""The first floor: what turns a rewritten model into files that run without it. It stands on `dcconvert.passes`.

- `buckets`: the ladder of static shapes that a model is exported and compiled for.
- `lowerings`, `onnx_export`: each custom op in ONNX, and the graphs as ONNX files.
- `session`: an exported model on ONNX Runtime, with the plan made on the host.
- `bundle`: the output folder of a conversion, written whole or not at all.
- `parity`: the checks that a conversion must pass.
- `compute`, `latency`: multiply-adds, times and memory, original and converted alike.
"""
