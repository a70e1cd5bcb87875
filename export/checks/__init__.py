"""Checks and measurements of a conversion: parity, operations and bytes, latency and memory."""
