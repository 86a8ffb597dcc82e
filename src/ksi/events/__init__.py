"""Every event: what it is called, what it carries, and who hears of it."""
