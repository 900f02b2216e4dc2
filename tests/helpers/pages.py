"""A page that a command wrote, taken apart."""

from html.parser import HTMLParser


class _Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    """It is well formed, needs nothing from elsewhere and runs nothing -> its tags."""
    found = _Tags(text)
    assert not found.open
    assert not {"script", "link", "iframe", "object", "b2"} & {*found.seen}
    for name, value in found.attributes:
        assert not name.startswith("on") and (name not in ("src", "href") or value.startswith(("data:image/jpeg;base64,", "#")))
    return found
