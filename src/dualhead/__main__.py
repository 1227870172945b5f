"""`python -m dualhead`."""

from dualhead.commands.cli import main

main()
