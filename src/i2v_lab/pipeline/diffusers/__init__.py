"""diffusers' pipelines; the only package that imports diffusers."""
