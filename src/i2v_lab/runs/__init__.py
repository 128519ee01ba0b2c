"""One run: described, executed, recorded, looked up."""
