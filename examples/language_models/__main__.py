"""`python examples/language_models`, as `python -m uncertainty_mm.examples.language_models`."""

from uncertainty_mm.examples.language_models.harness import main

if __name__ == "__main__":
    main()
