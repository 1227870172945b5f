"""`python -m dualhead`."""

from dualhead.cli import main

main()
