"""`python -m jaxsae`, the same as the `jaxsae` command."""

import sys

from jaxsae.app.cli import main

sys.exit(main())
