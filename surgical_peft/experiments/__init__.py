"""The lab: recipes, tasks, trainings, searches, comparisons and advice. `import surgical_peft` brings in none of it."""
