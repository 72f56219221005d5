"""Generated input that nobody meant: families of cases, each with a check of what is accepted."""
