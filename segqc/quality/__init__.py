"""Metrics, error maps, error boxes, calibration, prediction intervals and ranking."""
