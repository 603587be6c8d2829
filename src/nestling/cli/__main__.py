"""`python -m nestling.cli`: the same as the `nestling` command."""

import sys

from nestling.cli import main

sys.exit(main())
