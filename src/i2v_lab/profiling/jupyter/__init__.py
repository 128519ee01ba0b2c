"""Magics, cell meter and papermill engine."""
