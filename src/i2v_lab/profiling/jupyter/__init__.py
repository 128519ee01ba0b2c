"""Jupyter integration: magics, a meter for every cell, and a papermill engine."""
