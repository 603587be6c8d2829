"""`python -m nestling`, and so `torchrun -m nestling`, for the command line of several processes."""

import sys

from nestling.cli import main

if __name__ == "__main__":
    sys.exit(main())
