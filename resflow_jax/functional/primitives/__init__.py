"""JAX primitives with their own rules, and traced programs as values. Only this folder uses internals of JAX."""
