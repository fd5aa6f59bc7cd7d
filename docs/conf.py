"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build/html`."""

import os
import re

from torch import nn

import uncertainty_mm
from uncertainty_mm._component import Component

project = "uncertainty-mm"
author = "The uncertainty-mm developers"
copyright = f"2026, {author}"
version = release = uncertainty_mm.__version__

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
]
# study: included by other pages; laboratory: diaries; tutorials: rendered into generated/tutorials
exclude_patterns = ["_build", "laboratory", "study", "tutorials"]
default_role = "literal"  # `name` in a docstring is code
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"
maximum_signature_line_length = 60  # one argument a line beyond
html_title = f"uncertainty-mm {release}"
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"
myst_enable_extensions = ["attrs_block", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every tutorial is run; one that raises fails the build.
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "generated/tutorials",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "remove_config_comments": True,
    "capture_repr": (),  # what a page shows is printed or drawn
    "doc_module": ("uncertainty_mm",),  # names in the code lead to the API pages
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 3600,  # no build times on the pages
}

# Figures of pages are drawn when these are built.
plot_formats = [("png", 110)]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_include_source = False
plot_working_directory = os.path.dirname(__file__)  # for the package `laboratory`
plot_pre_code = "import numpy as np\nimport torch\nfrom matplotlib import pyplot as plt\n" + (
    "from uncertainty_mm import plots\ntorch.manual_seed(0)\n"
)

# Links into the documentation of Python and PyTorch need the network: UNCERTAINTY_MM_INTERSPHINX=1.
if os.environ.get("UNCERTAINTY_MM_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

autoclass_content = "class"
autodoc_default_options = {
    "members": True,
    "exclude-members": "extra_repr",
    "show-inheritance": True,
}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Array": "Array", "AxesArray": "AxesArray"}  # of uncertainty_mm.plots
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The examples in the docstrings see the names of their own module, as under `pytest --doctest-modules`.
doctest_global_setup = """
import numpy as np
import torch
import torch.nn.functional as F
from uncertainty_mm import *
from uncertainty_mm import metrics
from uncertainty_mm.calibration import *
from uncertainty_mm.data import *
from uncertainty_mm.data.convert import *
from uncertainty_mm.data.transforms import *
from uncertainty_mm.distributed import *
from uncertainty_mm.encoder import *
from uncertainty_mm.functional import *
from uncertainty_mm.metrics.functional import *
from uncertainty_mm.metrics import *
torch.manual_seed(0)
"""


def skip_tuple_fields(app, what, name, obj, skip, options):
    """Leaves out "Alias for field number 0": the docstring of the class documents the fields."""
    return skip or str(getattr(obj, "__doc__", "")).startswith("Alias for field number")


def public_bases(app, name, obj, options, bases):
    """Names `nn.Module` where a class derives from the private base of all components."""
    bases[:] = [nn.Module if base is Component else base for base in bases]


def plain_aliases(app, what, name, obj, options, signature, returns):
    """Writes a type alias by its name also within a union, where Sphinx writes the class that stands for it."""
    alias = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
    return alias.sub(r"\1", signature or "") or None, returns


def mathml(display):
    """Writes equations as MathML, which browsers draw without a script."""
    # only here: the tests read this file for `doctest_global_setup`, where Sphinx is not installed
    from docutils import nodes
    from latex2mathml.converter import convert

    def visit(translator, node):
        latex = node.astext()
        for escaped, plain in ((r"\_", "_"), (r"\lVert", r"\|"), (r"\rVert", r"\|")):
            latex = latex.replace(escaped, plain)  # the bars of a norm keep their size
        if "&" in latex and r"\begin" not in latex:  # lines that are aligned
            latex = rf"\begin{{split}}{latex}\end{{split}}"
        translator.body.append(convert(latex, display=display))
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Registers the hooks with Sphinx."""
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-signature", plain_aliases)
