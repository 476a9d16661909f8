"""Every link of the built site that stays on the site must lead somewhere, anchors included.

python docs/check_links.py build/docs
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# what one file that is complete by itself holds is not looked at
SKIPPED = ("playground.html", "slides/[0-9]*.html")
ATTRIBUTES = {"href", "src", "data-src", "poster"}


class Page(HTMLParser):
    """The anchors and the links of a page."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links = {""}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Collect ids, and addresses of whatever kind."""
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in ATTRIBUTES and value is not None:
                self.links.append(value)


def dead_links(site):
    """Pairs of a page and a link on it that leads nowhere, and the number of links looked at."""
    files = []
    for file in sorted(site.rglob("*.html")):
        skipped = any(file.relative_to(site).match(pattern) for pattern in SKIPPED)
        if not skipped and "_static" not in file.parts:  # templates of the theme
            files.append(file)
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in files}
    dead, looked_at = [], 0
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            looked_at += 1
            target = file
            if parts.path:
                target = (file.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                target = target / "index.html"
            anchor = unquote(parts.fragment)
            if not target.exists():
                dead.append((file, link))
            elif target in pages and anchor not in pages[target].anchors:
                dead.append((file, link))
    return dead, looked_at


def main(site):
    """Print the dead links; fail when there are any."""
    site = Path(site).resolve()
    dead, looked_at = dead_links(site)
    for file, link in dead:
        print(f"{file.relative_to(site)}: {link} leads nowhere")
    if dead:
        sys.exit(f"{len(dead)} of {looked_at} links within the site lead nowhere")
    print(f"{looked_at} links within the site, all lead somewhere")


if __name__ == "__main__":
    main(*sys.argv[1:])
