"""`surgical-peft start`: from a model and data to a recipe."""
