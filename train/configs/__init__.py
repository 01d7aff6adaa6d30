"""Configurations of the training programs, one file each, by the name of the file."""
