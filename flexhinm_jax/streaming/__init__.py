"""Decoders pruned block by block in bounded memory."""
