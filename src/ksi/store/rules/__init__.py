"""Rules that hold for every store."""
