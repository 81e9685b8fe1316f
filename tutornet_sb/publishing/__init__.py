"""Finished runs exported, described and published."""
