"""Serialised pytree specs from untrusted files."""

from __future__ import annotations

import json
import reprlib

from torch.utils import _pytree as pytree

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80
shown = _shown.repr  # one short line, whatever a file holds


def treespec_fault(text: str) -> str:
    """Why a serialised pytree spec is rejected, or "".

    A context that holds a JSON object makes torch import a module by the name given there (enums, defaultdict).
    """
    stack = [json.loads(text)[1]]
    while stack:
        item = stack.pop()
        stack.extend(item["children_spec"])
        kind, context = item["type"], item["context"]
        if kind is None:
            continue
        if kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            return f"it holds a {shown(kind)}, unknown here: import the library that defines it first"
        if not isinstance(context, str) or "{" in context:
            return f"its {shown(kind)} asks for Python objects by name, which is not allowed"
    pytree.treespec_loads(text)
    return ""
