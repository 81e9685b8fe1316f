"""Stages of training a student, their Brains and their settings."""
