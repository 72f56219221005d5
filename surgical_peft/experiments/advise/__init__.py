"""`surgical-peft advise`."""
