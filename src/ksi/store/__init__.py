"""The durable truth: one protocol (`base`), and the places that keep it."""
