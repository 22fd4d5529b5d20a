"""Numbers to decide by: likelihoods, answers, and baselines to hold them against."""
