"""Writing the trunk again for packed tokens: the packer, attention that text joins, and one rule for each ATen op."""
