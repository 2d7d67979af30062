"""Run the command line as `python -m hashemb`, for when its script is not on the path."""

import sys

from hashemb.cli import main

if __name__ == "__main__":
    sys.exit(main())
