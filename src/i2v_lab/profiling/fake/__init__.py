"""Torch code run under fake tensors: devices, operators, allocator, workspaces."""
