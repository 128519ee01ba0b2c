"""Profilers: meters of memory, and sinks that attribute it to a pipeline's phases and modules."""
