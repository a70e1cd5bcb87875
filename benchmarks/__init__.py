"""Scripts that measure dcconvert; each writes a JSON file under results/."""
