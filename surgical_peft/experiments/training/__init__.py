"""One training of a recipe, its report and its card."""
