"""Training a converted model with the original as its teacher."""
