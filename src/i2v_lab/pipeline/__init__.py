"""The two-stage image-to-video pipeline: architectures, weights, media, phases, and their order."""
