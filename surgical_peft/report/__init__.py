"""Plots and tables of what was measured."""
