"""TensorRT engines: which ones a bundle needs, building them in a process of its own, the index of what was built."""
