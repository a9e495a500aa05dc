"""`python -m satlib COMMAND`: see `satlib.cli`."""

import sys

from satlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
