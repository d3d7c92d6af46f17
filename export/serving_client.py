"""`mt3 client` by the name it had before."""

import sys

from mt3_keras.cli.client import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
