"""Rewriting the trunk for packed tokens: the packer, joint attention with text, and one rule for each ATen op."""
