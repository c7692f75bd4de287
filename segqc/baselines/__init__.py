"""What SegQC is measured against (method, "The baselines"): each method gives one `Estimate` per structure."""
