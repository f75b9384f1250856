"""New operations of JAX with rules of their own, and traced programs as values: all that needs JAX's internals."""
