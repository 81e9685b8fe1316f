"""Runs made into models for their users: exported, loaded, published."""
