"""Sphinx: the site of the course. `make docs` writes what it reads, with stage.py."""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from contents import ROOT  # noqa: E402  beside this file
from stage import DECKS, MATHJAX, SOURCE, settings  # noqa: E402

ini = settings()
project, author, release = ini["title"], ini["author"], ini["version"]
copyright = ini["copyright"]  # the name that Sphinx wants

extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"  # notebooks are shown as they are stored
nb_render_markdown_format = "myst"  # else tables in outputs stay text
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a heading that skips a level is fine in a notebook
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "bitflow_edu"
html_baseurl = f"{ini['doc_host']}{ini['doc_baseurl']}/"
html_favicon = str(ROOT / "docs" / "favicon.svg")
html_static_path = [str(SOURCE / "_static")]
html_css_files = ["style.css"]
html_show_sphinx = False
html_search_scorer = str(ROOT / "docs" / "search_order.js")
if MATHJAX.exists():  # else formulas come from Sphinx's default address; make docs says so
    mathjax_path = MATHJAX.name
PLAYGROUND = ROOT / "build" / "playground.html"
# a folder's contents are copied, so that the decks are in slides/
html_extra_path = [str(path) for path in (PLAYGROUND, DECKS.parent) if path.exists()]
html_theme_options = {
    "repository_url": ini["git_url"],
    "repository_branch": ini["branch"],
    "path_to_docs": "",
    "use_repository_button": True,
    "use_download_button": True,
    "launch_buttons": {
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
        "notebook_interface": "jupyterlab",
    },
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}


def offer_stored_notebooks(app, error):
    """The download button gives the notebook of the repository, not the copy made for Sphinx."""
    if error is None and app.builder.name == "html":
        copies = Path(app.outdir, "_sources")
        for copied in copies.rglob("*.ipynb"):
            stored = ROOT / copied.relative_to(copies)
            if stored.exists():
                shutil.copyfile(stored, copied)


def setup(app):
    """Sphinx calls this."""
    app.connect("build-finished", offer_stored_notebooks)
