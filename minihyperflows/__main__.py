"""``python -m minihyperflows`` is the command line."""

import sys

from minihyperflows.lab.cli import main

sys.exit(main())
