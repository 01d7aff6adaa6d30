"""Pruning in one pass through a function, every weight on what the pruned ones give."""
