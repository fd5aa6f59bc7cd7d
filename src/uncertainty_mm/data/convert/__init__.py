"""Foreign files, read and converted to the layout of :func:`~uncertainty_mm.data.read_npz`."""
