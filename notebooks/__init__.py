"""Notebooks, and what they draw with."""
