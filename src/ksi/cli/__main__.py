"""`python -m ksi.cli`: the command without its launcher script."""

from ksi.cli import main

main()
