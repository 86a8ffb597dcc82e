"""Requests that a run itself sends: their parent, and the run's wait for them."""
