"""A converted model in ONNX Runtime, in TensorRT and behind Triton."""
