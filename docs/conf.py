"""How Sphinx makes the site: `bash scripts/docs.sh`.

Its source is the whole repository, so that links in a page lead where they do on GitHub.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.roles import XRefRole

import runmgr

if TYPE_CHECKING:
    from types import ModuleType

    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = html_title = "runmgr"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
include_patterns = ["*.md", "docs/**.md", "benchmarks/README.md"]
exclude_patterns = [".*", "build", "checkpoints"]
root_doc = "docs/index"
html_theme = "furo"
html_extra_path = ["index.html"]  # leads there from the site's root
html_show_copyright = html_copy_source = False
myst_heading_anchors = 3  # as on GitHub
default_role = "mention"  # what docstrings put between single backticks
autodoc_member_order = "bysource"
autodoc_default_options = {"undoc-members": True}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
nitpick_ignore_regex = [
    ("py:.*", r"(?!runmgr\.).*"),  # types of torch and Python: the build needs no network
    ("py:class", r".*\.(Arguments|Result|PerRank)"),  # type variables, and what nobody looks into
]


class Mention(XRefRole):
    """Words between single backticks: a link where they name something of ours, else code."""

    def process_link(self, env: BuildEnvironment, refnode: nodes.Element, *_given: Any) -> tuple[str, str]:
        """Look for it as Sphinx looks for Python objects, from where it stands."""
        scope = {name: env.ref_context.get(name) for name in ("py:module", "py:class")}
        refnode.attributes.update(scope, refdomain="py", reftype="obj", is_mention=True)
        return self.text, self.text.removesuffix("()")


def know_types(module: ModuleType) -> None:
    """Do a module's imports for type checkers, now that all modules are there, so that its annotations mean something."""
    for statement in ast.parse(inspect.getsource(module)).body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(statement.body, []), str(module.__file__), "exec"), vars(module))


def find(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Find a public name that is written as the module has it where it is made; None says that a reference is broken."""
    name = node["reftarget"].rpartition(".")[2]
    if node["reftarget"].startswith("runmgr.") and name in runmgr.__all__:
        return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", f"runmgr.{name}", node, content)
    return content if node.get("is_mention") else None


def leave_directories(app: Sphinx, document: nodes.document) -> None:
    """Leave the text alone of links to a directory of the repository, which has no page."""
    here = Path(app.env.doc2path(app.env.current_document.docname)).parent
    for link in list(document.findall(pending_xref)):
        if link["reftype"] == "myst" and (here / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def lay_out(_app: Sphinx, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """Make definitions of a docstring's table: a name, two spaces or more, and what it is."""
    text = "\n".join(lines)
    if text.startswith("Alias for field number"):  # a named tuple's
        text = ""
    lines[:] = re.sub(r"^(\S+(?: \S+)*?) {2,}(\S.*(?:\n {8,}\S.*)*)", _definition, text, flags=re.MULTILINE).split("\n")


def _definition(row: re.Match[str]) -> str:
    return f"`{row[1]}`\n    {' '.join(row[2].split())}"


def setup(app: Sphinx) -> None:
    """Tell Sphinx of the above."""
    for module in pkgutil.walk_packages(runmgr.__path__, "runmgr."):
        if not re.search(r"__main__|\.examples", module.name):
            know_types(importlib.import_module(module.name))
    app.add_role("mention", Mention(innernodeclass=nodes.literal))
    app.connect("missing-reference", find)
    app.connect("doctree-read", leave_directories)
    app.connect("autodoc-process-docstring", lay_out)
