"""The service: what a client can ask of completions, and one request's way from the queue to its end."""
