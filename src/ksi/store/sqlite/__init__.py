"""The store in one SQLite file: `store.SqliteStore` has the verbs."""
