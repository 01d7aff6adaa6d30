"""From one matrix to a model: find the weights, take statistics, run them packed."""
