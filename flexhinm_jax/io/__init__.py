"""Files in and out: Hugging Face directories, the packed file, training checkpoints.

Everything is written to a temporary sibling and renamed, so an output is complete or
absent. Errors name the file and what to do about it.
"""
