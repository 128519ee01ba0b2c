"""Figures: of Vega-Lite and of matplotlib for files and pages, SVG text for JupyterLab's views; one palette for all."""
