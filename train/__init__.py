"""Training: preparing data sets, runs, scores."""
