"""``python -m minihyperflows`` is the command line."""

import sys

from minihyperflows.cli import main

sys.exit(main())
