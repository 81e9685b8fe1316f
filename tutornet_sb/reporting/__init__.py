"""Scores and tables made from finished runs."""
