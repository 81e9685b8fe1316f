"""Plans of runs, and reports that compare finished runs."""
