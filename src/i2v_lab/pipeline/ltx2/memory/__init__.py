"""Memory techniques: ltx-core's modules and weights, run with fewer bytes allocated at a time."""
