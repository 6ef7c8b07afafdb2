"""``python -m fastunlearn`` is the ``fastunlearn`` command."""

import sys

from fastunlearn.cli import main

sys.exit(main())
