"""`python -m specqd.cli`."""

from specqd.cli import main

main()
