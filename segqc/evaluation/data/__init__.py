"""What an experiment works on: cohort, mask sources, predictions, and the run folder that keeps them."""
