"""Other methods beside LDDU, on the same data, with the same measures; see `comparison.py`."""
