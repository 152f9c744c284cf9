"""`python -m multisbora` is `multisbora`."""

from .cli import main

main()
