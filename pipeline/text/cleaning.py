"""Captions as LlamaGen's authors cleaned them for training: the routine of DeepFloyd IF and PixArt, run twice.

A teacher that never saw an address, a file name or a capital letter should not be asked with them. The order of the
rules matters, and so does the second run: what the first leaves may be cut further. Every rule takes time that grows
with the length of the text and no faster, whatever the text. Where the plain form of a rule would begin anew at every
letter of a long word, ours has a last alternative, the group ``kept``, which walks past the word at once: if a match
cannot begin at the first letter, it cannot at any later one.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from urllib.parse import unquote_plus

from pipeline.host.errors import Missing

RULES = "deepfloyd-2"  # names these rules, run twice, in the facts of a pair set; other rules are another name
INSTALL = "pip install 'distilled-decoding[text]'"

HOST = r"[a-zA-Z0-9.\-]"
DOMAINS = "com|co|ru|net|org|edu|gov|it"
SUFFIXES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    r"\ufe31\ufe32\ufe58\ufe63\uff0d"
)

Rule = tuple[str, str]
"""(regular expression, what takes the place of every match)."""


def _addresses(scheme: str) -> Rule:
    """A scheme with the slashes behind it, or a host with its path, is deleted; a query stays."""
    begun = rf"\b{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])"
    host = rf"\b{HOST}+[.](?:{DOMAINS})[\w/\-]*\b/?(?!@)"
    passed = rf"\b(?P<kept>{HOST}+?)(?={begun}|(?!{HOST}))"
    return rf"{begun}|{host}|{passed}", r"\g<kept>"


BEFORE_MARKUP: tuple[Rule, ...] = (
    ("[\ud800-\udfff]", "\ufffd"),  # half a character: not the routine's, in which Beautiful Soup would raise
    ("<person>", "person"),
    _addresses("https?"),
    _addresses("www"),
)
AFTER_MARKUP: tuple[Rule, ...] = (
    (r"@\w+", ""),  # names of users
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes, enclosed letters, units, ideographs; kana and Hangul stay
    (rf"[{DASHES}]+", "-"),
    ("[`\u00b4\u00a8\u00ab\u00bb\u201c\u201d]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),  # the end of an article's number
    (r"\\n", " "),  # a backslash and an n, as careless exports have them
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{SUFFIXES})|(?P<kept>\S+)", r"\g<kept>"),  # names of files
    ("[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),
)
HYPHENS = re.compile(r"[\-_]")
FEW = 3  # hyphens that a caption may have; with more it is a file's name, whose hyphens stand for blanks
AFTER_REPAIR: tuple[Rule, ...] = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{SUFFIXES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*+\b", " "),  # j2d1a2a
    ("\\b\\d+(?:\\.\\d*)?[x\u0445\u00d7]\\d+(?:\\.\\d*)?\\b", ""),  # 50x50, with the Cyrillic ha, too
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def cleaned(text: str) -> str:
    """A caption after two runs of the rules; maybe empty. Missing where the packages of the extra ``text`` are."""
    return _once(_once(text))


def check() -> None:
    """Missing, with what to install, where the packages are not there that the cleaning needs."""
    absent = [name for name, module in (("ftfy", "ftfy"), ("beautifulsoup4", "bs4")) if find_spec(module) is None]
    if absent:
        raise Missing(
            f"text.clean needs {' and '.join(absent)}, not installed here; {INSTALL}, or set text.clean to false."
        )


def _once(text: str) -> str:
    markup_to_text, repaired = _packages()
    text = unquote_plus(text).strip().lower()
    text = markup_to_text(_applied(BEFORE_MARKUP, text))
    text = _applied(AFTER_MARKUP, text)
    if len(HYPHENS.findall(text)) > FEW:
        text = HYPHENS.sub(" ", text)
    text = html.unescape(html.unescape(repaired(text))).strip()
    return _applied(AFTER_REPAIR, text).strip()


def _applied(rules: tuple[Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


@cache
def _packages() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Beautiful Soup's text of some markup, and ftfy's repair of wrongly decoded text."""
    check()
    import bs4
    import ftfy

    # A caption may look like a file's name, an address or XML, and is meant as none of them.
    for kind in (bs4.MarkupResemblesLocatorWarning, bs4.XMLParsedAsHTMLWarning):
        warnings.filterwarnings("ignore", category=kind)

    def text_of(markup: str) -> str:
        """Without tags, and with what entities stand for; markup that the parser rejects stays as it is."""
        try:
            return bs4.BeautifulSoup(markup, features="html.parser").text
        except bs4.ParserRejectedMarkup:
            return markup

    return text_of, ftfy.fix_text
