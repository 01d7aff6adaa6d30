"""Masks of frozen weights: what learns them, on which models, and the comparison."""
