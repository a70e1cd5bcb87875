"""What a conversion is checked and measured by: parity, operations and bytes, latency and memory."""
