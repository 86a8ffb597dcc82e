"""One frozen configuration: its types, how it is read, and how it may be shown."""
