"""Runs one test file under Bazel, whose tests are programs."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([*sys.argv[1:], "-p", "no:cacheprovider"]))
