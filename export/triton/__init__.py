"""A bundle as a model repository for Triton Inference Server, and the code that runs in the server."""
