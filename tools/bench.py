"""Measure speed or perplexity: the same as `ffmini bench`."""

import sys

from ffmini.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", *sys.argv[1:]]))
