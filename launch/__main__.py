"""`python -m launch` is the `qsparse` command without an installation."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
