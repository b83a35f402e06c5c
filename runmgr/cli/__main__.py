"""`python -m runmgr.cli` is `runmgr`."""

import sys

from runmgr.cli import main

sys.exit(main())
