"""``python -m mmfast``."""

import sys

from mmfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
