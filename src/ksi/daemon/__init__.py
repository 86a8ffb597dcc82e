"""The only place that builds the parts, and their life as a process."""
