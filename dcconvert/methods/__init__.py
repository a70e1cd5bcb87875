"""Published methods by name, and fitting them to a ratio on runs of the model."""
