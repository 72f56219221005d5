"""Saving and loading adapters, and whether one belongs to a model."""
