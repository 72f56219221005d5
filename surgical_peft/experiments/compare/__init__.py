"""`surgical-peft compare`."""
