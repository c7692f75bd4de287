"""The experiments of the paper, and the one on observers."""
