"""Training pruned parameters: what keeps zeros zero."""
