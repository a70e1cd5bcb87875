"""Modules that are inserted into a graph: routers, and embeddings for other patch sizes."""
