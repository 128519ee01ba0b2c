"""Figures: matplotlib's for files, SVG text for JupyterLab's views; one palette for both."""
