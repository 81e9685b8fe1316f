"""Errors, files, signals, processes and YAML, apart from speech."""
