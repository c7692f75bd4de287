"""The methods that are compared: SegQC's and the baselines (method, "The baselines")."""
