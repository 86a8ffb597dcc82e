"""What the daemon needs of its machine: files, processes, logs, and where systems differ."""
