"""`python -m flashrt`: the command line, see cli."""

import sys

from flashrt.cli import main

sys.exit(main())
