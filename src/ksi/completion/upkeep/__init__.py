"""Long-lived tasks next to the queue: clean-up, the response log, checkpoints, the clock, and a shared store."""
