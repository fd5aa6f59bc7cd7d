"""Runs `comparison.py`, in a checkout as `python examples/baselines`."""

from uncertainty_mm.examples.baselines.comparison import main

if __name__ == "__main__":
    main()
