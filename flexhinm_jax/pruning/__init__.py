"""From one matrix to a model: statistics, solving, plans and their report."""
