"""The store that several daemons share, in Redis or Valkey: `store.RedisStore` has the verbs."""
