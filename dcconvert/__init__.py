"""dcconvert."""
