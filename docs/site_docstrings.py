"""The docstrings of the package on the pages of its API: plain text with aligned lists becomes what Sphinx reads.

A docstring has paragraphs, lists of arguments (a name, two blanks or more, what it is) and indented programs. A list
becomes a table of two columns, `name` in backquotes a link where it is public.

    .. public-names:: moecomm.exchange

documents what `moecomm.exchange` exports and `moecomm` does not.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ARGUMENT = re.compile(r"(?P<name>[*\w.\[\]]\S*(?:(?:, | and | )[\w*.\[\]]+){0,3}) {2,}(?P<about>\S.*)")
SPECIAL = re.compile(r"([\\*_|<>])")
EMPHASIS = re.compile(r"(?<!\S)\\\*(\w+)\\\*(?!\S)")
"""*word*, behind SPECIAL."""
QUOTED = re.compile(r"``?([^`]+)``?")
PRIVATE_BASES = {"Identity", "Failing", "ABC", "Generic", "_Wrapper"}
MODULES = (
    "moecomm",
    "moecomm.all_to_all",
    "moecomm.gating",
    "moecomm.exchange",
    "moecomm.transports",
    "moecomm.transports.threads",
    "moecomm.transports.mpi",
    "moecomm.transports.torch",
    "moecomm.transports.nccl",
    "moecomm.transports.wrappers",
    "moecomm.groups",
    "moecomm.topology",
    "moecomm.nn",
    "moecomm.nn.checkpoint",
    "moecomm.nn.deepspeed",
    "moecomm.integrations.transformers",
    "moecomm.distill",
    "moecomm.serve",
    "moecomm.cost",
    "moecomm.draw",
    "moecomm.testing",
)
"""Those with a section of the reference: a name that several of them export is documented in the first."""


def exported(module_name: str) -> list[str]:
    """The public names of a module: those of __all__, or the classes and functions that it defines."""
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", None)
    if names is not None:
        return list(names)
    own = []
    for name, value in vars(module).items():
        is_code = inspect.isclass(value) or inspect.isfunction(value)
        if is_code and not name.startswith("_") and value.__module__ == module_name and inspect.getdoc(value):
            own.append(name)
    return own


def homes() -> dict[str, str]:
    """Public name -> the module under which it is documented."""
    found: dict[str, str] = {}
    for module_name in MODULES:
        for name in exported(module_name):
            found.setdefault(name, module_name)
    return found


def markup(text: str) -> str:
    """A line of a docstring, with what reStructuredText would take for its own marked as plain."""
    parts = []
    end = 0
    for match in QUOTED.finditer(text):
        parts.append(SPECIAL.sub(r"\\\1", text[end : match.start()]))
        parts.append(reference(match[1]))
        end = match.end()
    parts.append(SPECIAL.sub(r"\\\1", text[end:]).replace("`", r"\`"))
    return EMPHASIS.sub(r"*\1*", "".join(parts))


def reference(name: str) -> str:
    """A link to a public name or to its attribute, or the words as code."""
    first = name.partition(".")[0].removesuffix("()")
    module_name = homes().get(first)
    if module_name is None or not re.fullmatch(r"[\w.]+(\(\))?", name):
        # Nothing touches the marks: a letter behind them would end the markup.
        return rf"\ ``{name}``\ "
    return rf"\ :py:obj:`{name} <{module_name}.{name.removesuffix('()')}>`\ "


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    for is_blank, group in groupby(lines, key=lambda line: not line.strip()):
        if not is_blank:
            yield list(group)


def rendered(lines: list[str]) -> list[str]:
    """A docstring in reStructuredText."""
    result: list[str] = []
    is_program = False
    for paragraph in paragraphs(lines):
        if paragraph[0].startswith("    "):
            # Blank lines do not end a program.
            result += ["", *paragraph] if is_program else ["", ".. code-block:: text", "", *paragraph]
            is_program = True
            continue
        is_program = False
        result += ["", *_paragraph(paragraph)]
    return [*result, ""]


def _paragraph(lines: list[str]) -> list[str]:
    """Lines of prose as they are, and the runs of arguments between them as tables."""
    result: list[str] = []
    rows: list[tuple[str, str]] = []
    for line in lines:
        match = ARGUMENT.fullmatch(line)
        if match:
            rows.append((match["name"], match["about"]))
        elif rows and line.startswith(" "):
            name, about = rows[-1]
            rows[-1] = name, f"{about} {line.strip()}"
        else:
            result += _table(rows)
            rows = []
            result += _listed(line)
    return result + _table(rows)


def _listed(line: str) -> list[str]:
    if line.startswith("- "):
        return ["", f"- {markup(line[2:])}"]
    return [markup(line) if not line.startswith(" ") else "  " + markup(line.strip())]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    lines = ["", ".. list-table::", "   :class: arguments", ""]
    for name, about in rows:
        lines += [f"   * - ``{name}``", f"     - {markup(about)}"]
    return [*lines, ""]


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event: `lines` is changed in place."""
    # A value without a docstring of its own has that of its class, such as dict's.
    is_own = what != "data" or inspect.getdoc(obj) != inspect.getdoc(type(obj))
    lines[:] = rendered(lines) if is_own else []


def visible_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list[type]) -> None:
    """Sphinx's event: `bases` loses the classes that a reader cannot look up."""
    bases[:] = [base for base in bases if getattr(base, "__name__", "") not in PRIVATE_BASES] or [object]


class PublicNames(SphinxDirective):
    """`.. public-names:: MODULE`: the module's docstring and each public name that is documented there."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of all of them."""
        module_name = self.arguments[0]
        module = importlib.import_module(module_name)
        home = homes()
        lines = [f".. automodule:: {module_name}", "   :no-members:", ""]
        elsewhere = []
        for name in exported(module_name):
            if home[name] != module_name:
                elsewhere.append(name)
                continue
            value = getattr(module, name)
            if inspect.isclass(value):
                kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
                lines += [f".. {kind}:: {module_name}.{name}", "   :members:", "   :show-inheritance:"]
                if "__call__" in vars(value):
                    lines += ["   :special-members: __call__"]
            elif inspect.isfunction(value):
                lines += [f".. autofunction:: {module_name}.{name}"]
            else:
                lines += [f".. autodata:: {module_name}.{name}", "   :no-value:"]
            lines.append("")
        if elsewhere:
            links = ", ".join(f":py:obj:`{name} <{home[name]}.{name}>`" for name in elsewhere)
            lines += [f"Documented elsewhere: {links}.", ""]
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source=module_name), self.content_offset, node)
        return node.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-bases", visible_bases)
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True}
