"""Convert a Hugging Face checkpoint into a packed directory: the same as `ffmini convert`."""

from ffmini.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
