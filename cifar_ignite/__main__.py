"""`python -m cifar_ignite` is the command line."""

import sys

from cifar_ignite.cli import main

sys.exit(main())
