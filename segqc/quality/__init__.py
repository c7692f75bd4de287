"""The quality of a mask: metrics, error maps, boxes, calibration, intervals and orders; no networks."""
