"""Other methods than LDDU, on the same data, with the same measures; see `comparison.py`."""
