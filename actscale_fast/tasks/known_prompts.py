"""What a prompt of a built-in task says about itself: its task, its kind of conflict, and its other wordings."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping, Sequence

from .country_capitals import ALIGNED_CONFLICT_TEMPLATES, CONFLICT_TEMPLATES
from .examples import Example, prompt_of
from .greater_than import GREATER_THAN_TEMPLATES
from .indirect_objects import ALIGNED_INDIRECT_OBJECT_TEMPLATES, INDIRECT_OBJECT_TEMPLATES
from .knowledge_conflicts import CONFLICT_KINDS, KNOWLEDGE_CONFLICT_TEMPLATES, ConflictKind

#: What a field may hold: no mark that ends a sentence or a clause, so that one template does not match another's text.
_FIELD = r"[^.:;!?\n]+?"
_KNOWLEDGE = "knowledge-conflict, "
#: By family: the templates that a prompt is rewritten in, and more that it is recognised in. Fields have one meaning.
_FAMILIES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "country-capital": (CONFLICT_TEMPLATES, ALIGNED_CONFLICT_TEMPLATES),
    "indirect-object": (INDIRECT_OBJECT_TEMPLATES, ALIGNED_INDIRECT_OBJECT_TEMPLATES),
    "greater-than": (GREATER_THAN_TEMPLATES, ()),
} | {f"{_KNOWLEDGE}{kind}": (templates, ()) for kind, templates in KNOWLEDGE_CONFLICT_TEMPLATES.items()}


def family_of(prompt: str) -> str | None:
    """The built-in task (of knowledge conflicts: the kind as well) that has a template for this prompt; else None."""
    for family, (own, more) in _FAMILIES.items():
        if any(_pattern(template).fullmatch(prompt) for template in (*own, *more)):
            return family
    return None


def conflict_kind(example: Example) -> ConflictKind | None:
    """The kind of an example of `knowledge_conflicts`, read from its prompt; None for any other example."""
    prompt = prompt_of(example)
    text = prompt if isinstance(prompt, str) else next((m["content"] for m in prompt if m["role"] == "user"), "")
    kind = (family_of(text) or "").removeprefix(_KNOWLEDGE)
    return kind if kind in CONFLICT_KINDS else None  # type: ignore[return-value]


def paraphrased(prompt: str, turn: int = 0) -> str | None:
    """The same prompt in another template of its task; None if it has none.

    Args:
        prompt: a text.
        turn: chooses among the other templates, which take turns.
    """
    for own, more in _FAMILIES.values():
        for template in (*own, *more):
            found = _pattern(template).fullmatch(prompt)
            if found is not None:
                others = [other for other in own if other != template]
                if not others:
                    return None
                text = others[turn % len(others)].format(**found.groupdict())
                return text[0].upper() + text[1:]
    return None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """What the texts of a template look like; a field that occurs twice is the same both times."""
    parts, seen = [], set()
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(literal))
        if field is not None:
            parts.append(f"(?P={field})" if field in seen else f"(?P<{field}>{_FIELD})")
            seen.add(field)
    text = "".join(parts)
    first = template[0]
    if first.isalpha():
        text = f"[{first.lower()}{first.upper()}]{text[1:]}"
    return re.compile(text)
