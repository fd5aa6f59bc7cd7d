"""The examples, which are next to this file in a wheel, and in the top-level folder `examples` in a checkout."""

from pathlib import Path

_checkout = Path(__file__).parents[3] / "examples"
if not Path(__file__).with_name("lddu_full.py").exists() and _checkout.is_dir():
    __path__ = [str(_checkout)]
