"""The lab: recipes, tasks, trainings, searches, comparisons, advice; `import surgical_peft` brings in none of it."""
