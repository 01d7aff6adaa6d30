"""Mathematics of one matrix: pure functions, no method or pattern names."""
