"""What the training programs and the benchmarks share."""
