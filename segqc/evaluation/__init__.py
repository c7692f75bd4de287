"""Estimates compared with truths."""
