"""What a person operates in JupyterLab: views over ``studies``, ``profiling`` and ``reporting``, without own logic.

Every view shows itself as widgets where somebody may answer, and as a static page everywhere else.
"""
