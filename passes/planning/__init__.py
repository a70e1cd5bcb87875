"""What is decided on the host, in numpy: how many tokens a step keeps, which ones, and the index arrays that say so."""
