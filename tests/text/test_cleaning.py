"""LlamaGen's cleaning: vectors of the official routine, every rule, odd texts, and no text that takes for ever."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from pipeline.host.errors import Missing
from pipeline.text import cleaning
from pipeline.text.cleaning import cleaned

needs_packages = pytest.mark.skipif(
    find_spec("ftfy") is None or find_spec("bs4") is None, reason="pip install 'distilled-decoding[text]'"
)

VECTORS = {  # of the official routine, with ftfy 6.3.1 and Beautiful Soup 4.15.0
    "Diamanttavla Pink Skull Beauty 50x50": "diamanttavla pink skull beauty",
    "CHRYSLER Town &amp; Country": "chrysler town country",
    "CHRYSLER Town & Country": "chrysler town country",
    "ToyWatch Men\u2019s Plasteramic Diver Watch": "toywatch men's plasteramic diver watch",
    "chanel-cruise-collection-fashion-show-2016-16-colorful-dresses-outfit (58)": (
        "chanel cruise collection fashion show 2016 16 colorful dresses outfit 58"
    ),
    "Meeting Facility, Holiday Inn Munich-Unterhaching": "meeting facility, holiday inn munich-unterhaching",
    "": "",
    "   ": "",
    "photo_of_a_cat.jpg": "",
    "a+b%20c C++": "a b c c",
    "see https://example.com/a/b?x=1 now": "see ?x=1 now",
    "@nick says hi #123 #1234 #12345": "says hi 1234",
    '"quoted, caption"': "quoted, caption",
    "line one\nline two\\n three": "line one line two three",
    "café naïve 東京 tower 😀": "café naïve tower 😀",
    "<b>bold</b> &lt;person&gt; <person> walking": "bold person person walking",
    "JC6640 dress jc6640vc 6640vc231": "dress",
    "page 12 of 30 ... end ...": "of 30 end",
    "123456 sold 12345": "sold 12345",
    "5x7 poster 10\u00d715cm": "poster 10\u00d715cm",
    "don''t \"\"\"AUSVERKAUFT\"\"\"": 'don"t "ausverkauft"',
    "it&#39;s &quot;fine&quot;": "it's \"fine\"",
}
RULES = {  # one or more for every rule, worked out by hand; x and y stand for what stays
    "1 percents and pluses": ("X%2Dy+Z", "x-y z"),
    "1 capitals and blanks": ("  ÄX  ", "äx"),
    "2 person": ("x <person> y", "x person y"),
    "3 a scheme": ("x https://y", "x y"),
    "3 three slashes at most": ("x http:////y", "x y"),
    "3 a scheme without slashes takes a letter": ("x http:yz", "x z"),
    "3 a host with its path": ("x my-shop.co/a_b/c-d/ y", "x y"),
    "3 what follows the last dot stays": ("x my-shop.co.uk y", "x uk y"),
    "3 an unknown country": ("x example.de y", "x example. de y"),
    "3 an address of mail stays a while": ("x me.com@y z", "x me. com z"),
    "3 www": ("x www://y", "x y"),
    "4 tags": ("x<br>y<i>z</i>", "xyz"),
    "4 entities": ("x &eacute;", "x é"),
    "5 users": ("x @some_one y", "x y"),
    "6 ideographs": ("x 㐀東 かな 한 y", "x かな 한 y"),
    "7 dashes": ("x\u2013\u2014y", "x-y"),
    "8 quotes": ("x \u201cy\u00bb z `w\u00b4 v", 'x "y" z "w" v'),
    "8 apostrophes": ("x\u2018s y", "x's y"),
    "9 leftovers": ("x &amp;quot; y &amp;amp z", "x y z"),
    "10 machines": ("x 192.168.0.12 y", "x y"),
    "11 the end of a number": ("x y 4:12 \x1f", "x y 4:12"),
    "12 a backslash and n": ("x\\ny", "x y"),
    "13 hashes of three": ("x #12 y", "x y"),
    "13 hashes of four": ("x #1234 y", "x 1234 y"),
    "13 hashes of five": ("x #12345 y", "x y"),
    "13 long numbers": ("x 123456 y 12345", "x y 12345"),
    "14 files": ("x some-file.jpeg y", "x y"),
    "14 what stands behind a file": ("x a.pngy", "x y"),
    "15 repeated quotes": ("x ''y", 'x "y'),
    "15 repeated dots": ("x..y", "x y"),
    "16 punctuation": ("x [y] {z} * w", "x y z w"),
    "16 a lonely dot": ("x . y", "x y"),
    "17 three hyphens stay": ("a-b-c_d", "a-b-c_d"),
    "17 four go": ("a-b-c_d-e", "a b c d e"),
    "18 repairs": ("x \ufb01 \uff46 y", "x fi f y"),
    "19 letters and digits": ("x ab123 y", "x y"),
    "19 two digits stay": ("x ab12 y", "x ab12 y"),
    "19 four letters stay": ("x abcd123 y", "x abcd123 y"),
    "19 letters, digits, letters": ("x ab1cd y", "x y"),
    "19 digits, letters, digits": ("x 1ab2 y", "x y"),
    "20 shipping": ("x worldwide free shipping y", "x y"),
    "20 download": ("x free download free y", "x y"),
    "20 click": ("x click for more y", "x y"),
    "20 suffixes": ("x png images y", "x y"),
    "20 pages": ("x page 7 y", "x y"),
    "21 codes": ("x 1a2b3c y", "x y"),
    "22 sizes": ("x 5.5\u00d77.25 y", "x y"),
    "22 but 19 comes first": ("x 5.5x7 y", "x 5. y"),
    "22 the Cyrillic ha": ("x 5\u04457 y", "x y"),
    "23 colons": ("x : y", "x: y"),
    "23 commas": ("x,y", "x, y"),
    "23 decimals stay": ("1.5,5 x", "1.5,5 x"),
    "24 blanks": ("x \t\u00a0 y", "x y"),
    "25 quotes around": ("'x y\"", "x y"),
    "25 ends": (":x y-", "x y"),
    "25 a dot and a word": (".xy", ""),
}
FRAGMENTS = (
    "http:// https:/ www: a.com a.com@ .com/ - _ @ # #1 #12345 123456 1.1.1.1 1:11 \\n \\ .jpg jpg ' \" '' .. . , / : ; + %"
    " %41 %e9 &amp; &amp &quot; &quot &lt; &#39; &#xd800; &#x110000; &nbsp &; <b> </b> <person> < > <!-- --> <! <![ ]> <?"
    " <![CDATA[ ]]> é ß 東 か 한 😀 \ud800 \ufffd \x00 \x1b ( ) [ ] { } | ~ * a1 ab123 a1b 1a2 1a2b3 5x5 5х5 5× x free"
    " download shipping worldwide click for page 3 Ã© â€™ ﬁ a\u0301 \u200b \u202e I\u0307 ½ ™"
).split(" ")
BLANKS = (" ", "  ", "\n", "\t", "\u00a0", "\u2028", "", "")


@needs_packages
@pytest.mark.parametrize("text", VECTORS)
def test_the_official_vectors(text: str) -> None:
    assert cleaned(text) == VECTORS[text]


@needs_packages
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str) -> None:
    text, expected = RULES[rule]
    assert cleaned(text) == expected


@needs_packages
def test_it_runs_twice() -> None:
    """What the first run makes a tag is cut by the second."""
    once = cleaning._once("x %26lt;b> y")
    assert once == "x <b> y"
    assert cleaned("x %26lt;b> y") == cleaning._once(once) == "x y"


@needs_packages
def test_odd_texts_do_not_raise() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        text = "".join(draw.choice(FRAGMENTS) + draw.choice(BLANKS) for _ in range(draw.randrange(1, 24)))
        found = cleaned(text)
        assert found == found.strip()
        found.encode()  # no half of a surrogate pair is left: tokenizers would not take it


def plain_address(scheme: str) -> str:
    """The rule as the official routine has it, with an end for every letter that it may begin at."""
    host = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
    return rf"\b((?:{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])|{host}))"


HOSTS = ("a", "com", ".co", ".com", ".", "-", "_", "/", "@", " ", ":", "http:", "https:", "www:", "//", "%", "é", "1")
DIGITS = ("1", "22", "a", "z", "é", "_", " ", ".", "\u0661")


def last(rules: tuple[cleaning.Rule, ...], mark: str) -> cleaning.Rule:
    return next(rule for rule in rules if mark in rule[0])


PLAIN: dict[str, tuple[cleaning.Rule, cleaning.Rule, tuple[str, ...]]] = {
    "https?": (cleaning._addresses("https?"), (plain_address("https?"), ""), HOSTS),
    "www": (cleaning._addresses("www"), (plain_address("www"), ""), HOSTS),
    "files": (
        last(cleaning.AFTER_MARKUP, "kept"),
        (rf"[\S]+\.(?:{cleaning.SUFFIXES})", ""),
        ("a", ".", "jpg", ".jpg", ".png", " ", "\n", "x"),
    ),
    "dots": (last(cleaning.AFTER_MARKUP, "(?<!"), (r"\s+\.\s+", " "), (".", " ", "\n", "\u00a0", "a")),
    "codes": (
        last(cleaning.AFTER_REPAIR, "*+"),
        (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
        DIGITS,
    ),
    "sizes": (
        last(cleaning.AFTER_REPAIR, "\u00d7"),
        ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),
        (*DIGITS, "x", "\u0445", "\u00d7"),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_forms_that_are_fast_mean_the_same(name: str) -> None:
    """As the plain ones, whose time grows with the square of the text's length."""
    own, plain, parts = PLAIN[name]
    draw = random.Random(1)
    touched = 0
    for _ in range(6000):
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(1, 14)))
        expected = re.sub(*plain, text)
        assert re.sub(*own, text) == expected, repr(text)
        touched += expected != text
    assert touched > 200


LONG = """
import random, string, sys
sys.setrecursionlimit(1000)
from pipeline.text.cleaning import cleaned
units = [*string.punctuation, *" \\n\\x00a1", "a.", "a-", "a.com@", "1.", " .", "a1", "1a", "1x", "<a ", "<b>", "<!--", "<!["]
units += ["<a></b>", "&amp;", "&#", "é", "東", "\\u2013", "a1a1", "a1a1é", "free ", "1:11 ", "http:", " : "]
for unit in units:
    for text in (unit * (100_000 // len(unit)), "1a1" + unit * (20_000 // len(unit)) + "é"):
        cleaned(text)
print("all")
"""


@needs_packages
@pytest.mark.slow
def test_no_text_takes_for_ever() -> None:
    """About a minute altogether; one rule that goes with the square would take an hour."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "all", done.stderr[-400:]


@needs_packages
def test_it_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    """Beautiful Soup would, of captions that look like a file, an address or XML."""
    cleaning._packages.cache_clear()
    for text in ("a &amp; b.jpg", "https://x&y", "<?xml version='1.0'?><a>b</a>"):
        cleaned(text)
    assert not [warning for warning in recwarn if "bs4" in str(warning.category)]


@pytest.mark.parametrize("absent", [{"ftfy"}, {"bs4"}, {"ftfy", "bs4"}])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, absent: set[str]) -> None:
    def find(module: str) -> Any:
        return None if module in absent else object()

    monkeypatch.setattr(cleaning, "find_spec", find)
    cleaning._packages.cache_clear()
    with pytest.raises(Missing, match=r"^text\.clean needs .*; pip install 'distilled-decoding\[text\]', or set") as caught:
        cleaned("x")
    assert ("ftfy" in str(caught.value), "beautifulsoup4" in str(caught.value)) == ("ftfy" in absent, "bs4" in absent)


def test_the_packages_are_imported_when_needed() -> None:
    code = "import sys, pipeline.text.cleaning; print(sorted({'ftfy', 'bs4'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
