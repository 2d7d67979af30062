"""`python -m hashemb`: the command line, where its script is not on the path."""

import sys

from hashemb.cli import main

sys.exit(main())
