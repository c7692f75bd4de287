"""The laboratory: estimators measured against truths, as in the paper. Nothing but the command imports it."""
