"""``python -m twinpath.cli``."""

from twinpath.cli.main import main

main()
