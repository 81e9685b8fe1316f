"""Frozen teachers, where they come from, and their vocabularies."""
