"""``python -m psap``."""

import sys

from psap.cli import main

sys.exit(main())
