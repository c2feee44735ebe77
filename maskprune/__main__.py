"""`python -m maskprune`, which torchrun starts as `-m maskprune`."""

import sys

from maskprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
