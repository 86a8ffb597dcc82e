"""The completion service: its requests by clients, and one request's way from the queue to its end."""
