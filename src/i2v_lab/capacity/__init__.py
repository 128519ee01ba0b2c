"""What fits a card: cards, searches, placements, this machine."""
