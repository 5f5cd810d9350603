"""The second door: python -m nemoport."""

from nemoport.cli import main

main()
