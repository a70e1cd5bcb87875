"""The middle layer: exports a rewritten model to files that run without it. It builds on `dcconvert.passes`.

- `bundle`: the output folder of a conversion, written whole or not at all.
- `buckets`: the static shapes that a model is exported and compiled for.
- `triton`: a bundle as a model repository for Triton Inference Server.
- `onnx`: the graphs as ONNX files.
- `runtimes`: running them.
- `engines`: TensorRT engines.
- `checks`: parity, operations, bytes, latency and memory.
"""
