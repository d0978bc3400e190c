"""`python -m jaxsae`, the same as the command `jaxsae`."""

import sys

from jaxsae.app.cli import main

sys.exit(main())
