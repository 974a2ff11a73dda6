"""The door ``python -m mom_layers.selftest``."""

import sys

from mom_layers.selftest.command import main

if __name__ == "__main__":
    sys.exit(main())
