"""What training adds to a converted model: adapters, and weights beside those of the original."""
