"""Interactive views for JupyterLab over ``studies``, ``profiling`` and ``reporting``.

A view displays itself as widgets in a live kernel's front end, and as static HTML everywhere else.
"""
