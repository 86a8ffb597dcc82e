"""The providers: one protocol (`base`), one small file for each."""
