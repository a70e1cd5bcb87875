"""A bundle as a model repository for Triton Inference Server, and what runs in the server."""
