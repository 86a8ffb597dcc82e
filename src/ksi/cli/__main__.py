"""`python -m ksi.cli`: the command without its launcher."""

from ksi.cli import main

main()
