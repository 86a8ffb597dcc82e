"""The page for a browser, and the admission of browsers."""
