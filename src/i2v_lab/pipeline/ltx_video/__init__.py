"""First-generation LTX-Video; the only package that imports ltx_video."""
