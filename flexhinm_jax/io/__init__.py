"""Files in and out: Hugging Face directories, the packed file, checkpoints of a run.

`fingerprint` says what decides about a result, `checkpoints` continues a run that was
killed. Errors name the file and what to do about it.
"""
