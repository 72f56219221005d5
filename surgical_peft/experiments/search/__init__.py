"""`surgical-peft search`."""
