"""Profilers: meters that count bytes, and sinks that join them to a pipeline's phases."""
