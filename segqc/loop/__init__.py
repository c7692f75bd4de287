"""The loop over a dataset folder: train, score, and the order in which scans are corrected."""
