"""Service version 1: completions as they were before the queue, on the same providers and the same response log."""
