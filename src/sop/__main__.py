"""`python -m sop` is the `sop` command."""

import sys

from sop.cli import main

sys.exit(main())
