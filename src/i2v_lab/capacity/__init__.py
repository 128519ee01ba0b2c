"""Capacity planning: GPUs, searches for the largest request that fits, memory policies, this machine's memory."""
