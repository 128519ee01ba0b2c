"""SVG figures inside an HTML page, with unique ids and a label for screen readers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

REFERENCE = re.compile(r"#([\w.:-]+)")
GLYPHS = re.compile(r"scale\(([\d.]+) -[\d.]+\)")  # Matplotlib draws a letter as a path 100 units high, scaled
# What is neither data nor a meaning takes the page's colours, so that a figure is dark on a dark page.
THEMED = {
    "#ffffff": "var(--page)",
    "#eeeeee": "var(--soft)",
    "#dddddd": "var(--line)",
    "#666666": "var(--quiet)",
    "#555555": "var(--quiet)",
    "#333333": "currentColor",
    "#000000": "currentColor",
    "#0072b2": "var(--no-grad)",  # the same blue, lighter on a dark page
}
COLOUR = re.compile(r"#[0-9a-f]{6}\b")
SMALLEST_PX = 9
"""Text of a figure is never drawn smaller than that: a narrow page scrolls the figure."""


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """An SVG document as an element of an HTML page.

    Matplotlib gives the clip paths and glyphs of every figure the same ids, and a page has one namespace for them:
    without a prefix a second figure would use the first one's. The figure's style sheet is scoped to the figure. Its
    least width is that at which its smallest text can be read, and its ink is the page's.

    Args:
        svg: A whole SVG document.
        prefix: Put before every id; unique on the page.
        label: What the figure shows, in words.

    Returns:
        The ``svg`` element, as an image with a label, without metadata.

    Raises:
        xml.etree.ElementTree.ParseError: ``svg`` is not XML.

    Example:
        >>> inline_svg('<svg><path id="a"/><use href="#a"/></svg>', "fig-1", "A line")
        '<svg id="fig-1" role="img" aria-label="A line"><path id="fig-1-a" /><use href="#fig-1-a" /></svg>'
    """
    root = ElementTree.fromstring(svg)  # noqa: S314 - a figure that a notebook of ours has just drawn
    own = {value for element in root.iter() if (value := element.get("id"))}

    def renamed(match: re.Match[str]) -> str:
        return f"#{prefix}-{match[1]}" if match[1] in own else match[0]

    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        for name, value in attributes.items():
            attributes[name] = f"{prefix}-{value}" if name == "id" else REFERENCE.sub(renamed, value)
            if name == "style":
                attributes[name] = COLOUR.sub(lambda match: THEMED.get(match[0], match[0]), attributes[name])
        element.attrib.clear()
        element.attrib.update(attributes)
        for child in [child for child in element if _local(child.tag) == "metadata"]:
            element.remove(child)
        if element.tag == "style" and element.text:
            element.text = f"#{prefix} {{ {REFERENCE.sub(renamed, element.text)} }}"
    root.attrib.pop("id", None)
    width_px = _least_width_px(root)
    style = {"style": f"min-width: {width_px}px"} if width_px else {}
    root.attrib = {"id": prefix, "role": "img", "aria-label": label, **root.attrib, **style}
    return ElementTree.tostring(root, encoding="unicode")


def _least_width_px(root: ElementTree.Element) -> int | None:
    """The width at which the smallest text is ``SMALLEST_PX`` high; ``None`` without text or a view box."""
    sizes = [
        *(100 * float(scale) for each in root.iter() for scale in GLYPHS.findall(each.get("transform", ""))),
        *(float(size) for each in root.iter() if (size := each.get("font-size", "").removesuffix("px")).isdecimal()),
    ]
    box = (root.get("viewBox") or "").split()
    return math.ceil(float(box[2]) * SMALLEST_PX / min(sizes)) if sizes and len(box) == 4 else None


def _local(name: str) -> str:
    """The local name: an HTML parser expects SVG's elements, and ``href``, without a namespace."""
    return name.rpartition("}")[2]
