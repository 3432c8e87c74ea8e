"""`python -m jobs.bench`: the bench where nothing but torch is installed."""

import sys

from jobs.bench import main

if __name__ == "__main__":
    sys.exit(main())
