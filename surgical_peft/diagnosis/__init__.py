"""A look before the run: one real step, and what is wrong with it, tensor by tensor."""
