"""The graphs as ONNX files: the lowering of every custom op, half precision, and the variants for each runtime."""
