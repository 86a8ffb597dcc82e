"""Requests that wait for a person: the reasons of their waits, and the answers."""
