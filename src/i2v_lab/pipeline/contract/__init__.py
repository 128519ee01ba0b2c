"""What every runner has in common."""
