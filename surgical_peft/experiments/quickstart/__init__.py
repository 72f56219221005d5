"""`surgical-peft quickstart`."""
