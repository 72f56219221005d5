"""`python -m surgical_peft`."""

from .cli import main

if __name__ == "__main__":
    main()
