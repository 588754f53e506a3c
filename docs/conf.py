"""How Sphinx builds the site from the pages of this folder: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "moecomm"
author = "the moecomm authors"
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "site_docstrings",
    "site_links",
    "site_programs",
]
exclude_patterns = ["figures", "tutorials"]
# A docstring says --flag and "word", and means these characters.
smartquotes = False

# The anchors of headings are those that test_docs.py and other viewers of Markdown know.
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page may begin a part with a heading of the third level

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = "moecomm"
html_static_path = ["style"]
html_css_files = ["site.css"]
html_favicon = "style/icon.svg"
html_domain_indices = False
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
# What a reader copies is a program, without the prompts.
copybutton_prompt_text = r"^\$ "
copybutton_prompt_is_regexp = True
