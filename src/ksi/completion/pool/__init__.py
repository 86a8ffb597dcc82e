"""The configured providers at work: their order, limits and state."""
