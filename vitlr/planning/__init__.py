"""Spectra and a budget to a plan: ranks and widths, and what stays dense."""
