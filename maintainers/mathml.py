"""A hook of the documentation: turn formulas into MathML, which browsers show without scripts or fonts."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex has marked."""
    block = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
    inline = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    content = block.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)
    return inline.sub(lambda match: convert(html.unescape(match[1])), content)
