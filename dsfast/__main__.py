"""`python -m dsfast <command>`."""

import sys

from dsfast.cli import main

sys.exit(main())
