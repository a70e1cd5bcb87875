"""Converted transformers in diffusers' pipelines: what a call says about the model, and what replaces it there."""
