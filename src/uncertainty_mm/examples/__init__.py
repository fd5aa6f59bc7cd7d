"""The examples: in a wheel they lie beside this file, in a checkout in the folder `examples` at its top."""

from pathlib import Path

_checkout = Path(__file__).parents[3] / "examples"
if not Path(__file__).with_name("lddu_full.py").exists() and _checkout.is_dir():
    __path__ = [str(_checkout)]
