"""Memory policies: ltx-core's modules as they are, run with fewer bytes alive at a time."""
