"""The loop over a studies folder: train, score, and the order in which scans are corrected."""
