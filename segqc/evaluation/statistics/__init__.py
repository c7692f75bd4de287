"""Estimates against truths as numbers, curves and intervals."""
