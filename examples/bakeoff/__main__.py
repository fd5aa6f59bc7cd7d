"""Runs `comparison.py`, in a checkout as `python examples/bakeoff`."""

from uncertainty_mm.examples.bakeoff.comparison import main

if __name__ == "__main__":
    main()
