"""Weights and statistics to spectra: factors and errors of every rank and width."""
