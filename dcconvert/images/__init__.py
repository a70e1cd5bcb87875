"""Images as data: reading data sets, and turning tensors into pictures."""
