"""`python -m jaxsae`, the same as the command `jaxsae`."""

import sys

from jaxsae.cli import main

sys.exit(main())
