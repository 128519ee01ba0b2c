"""Forecasts: torch code under fake tensors, a model of the caching allocator and of library workspaces."""
