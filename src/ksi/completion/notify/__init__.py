"""Notification of clients: waits for ends, subscriptions, and their events."""
