"""Every rule of fusion and every loss in one small model, with the same data and measures; see `comparison.py`."""
