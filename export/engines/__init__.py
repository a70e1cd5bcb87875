"""TensorRT engines: which ones a bundle needs, building them in a separate process, the index of built engines."""
