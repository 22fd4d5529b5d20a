from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.curate.dedup.urls import UrlDuplicates, normalize_urls
from puna.runtime.errors import InputError


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://www.Example.com/Path/", "example.com/Path"),
        ("http://example.com:80/a?b=1#frag", "example.com/a?b=1"),
        ("https://example.com:8080/a", "example.com:8080/a"),
        ("https://user:secret@example.com/", "example.com"),
        ("//example.com/a/?utm_source=x&b=1&gclid=7&fbclid", "example.com/a?b=1"),
        ("example.com/a?utm_source=x&utm_medium=y", "example.com/a"),
        ("example.com/a?x=1&gclidx=7&notutm_a=2", "example.com/a?x=1&gclidx=7&notutm_a=2"),
        ("example.com/a?b=2&a=1", "example.com/a?b=2&a=1"),
        ("example.com/a;jsessionid=AB12?b=2", "example.com/a?b=2"),
        ("  http://[2001:DB8::1]:443/x?  ", "[2001:db8::1]/x"),
        ("http://bücher.example/Ü?PHPSESSID=1", "bücher.example/Ü"),
        ("", ""),
        (None, None),
    ],
)
def test_normal_form(url: str | None, normal: str | None) -> None:
    assert normalize_urls(pa.chunked_array([[url]], pa.string())).to_pylist() == [normal]


TRACKING = ["utm_source", "utm_campaign", "gclid", "fbclid", "msclkid"]
names = st.text("abc", min_size=1, max_size=3)


@given(
    st.sampled_from(["http://", "https://", "HTTPS://", "//", ""]),
    st.sampled_from(["", "www.", "WWW.", "www2."]),
    names,
    st.lists(names, max_size=3),
    st.lists(st.tuples(names | st.sampled_from(TRACKING), st.text("ab-%.12", max_size=3)), max_size=5),
    st.sampled_from(["", "#", "#top?x=1&y"]),
    st.sampled_from(["", "/"]),
)
def test_agrees_with_a_parser(scheme, www, host, path, parameters, fragment, slash) -> None:
    query = "&".join(f"{name}={value}" for name, value in parameters)
    url = f"{scheme}{www}{host}.org{''.join('/' + part for part in path)}{slash}{'?' * bool(query)}{query}{fragment}"
    parts = urlsplit(url if scheme else "//" + url)
    kept = [pair for pair in parts.query.split("&") if pair and pair.split("=")[0] not in TRACKING]
    expected = f"{host}.org" + parts.path.rstrip("/") + ("?" + "&".join(kept) if kept else "")
    if not expected.endswith("/"):
        assert normalize_urls(pa.chunked_array([[url]])).to_pylist() == [expected]


def test_first_or_newest_version_is_kept(documents, run_global) -> None:
    urls = ["http://a.org/x", "https://www.a.org/x/", "http://b.org", None, None, "a.org/x#1"]
    dates = ["2020-01-01T00:00:00+02:00", "2019-12-31T22:30:00Z", "2020-01-01", None, None, "nonsense"]
    table = documents(["1", "2", "3", "4", "5", "6"], url=urls, date=dates)
    first = run_global(UrlDuplicates(), table, batch_rows=2)
    assert first.ids == ["d0", "d2", "d3", "d4"]
    assert set(first.reasons.values()) == {"same address as an earlier document"}
    newest = run_global(UrlDuplicates(date_column="date"), table, batch_rows=2)
    assert newest.ids == ["d1", "d2", "d3", "d4"]
    assert newest.reasons == dict.fromkeys(["d0", "d5"], "older version of the same address")
    assert newest.kept["url_duplicates_cluster"].to_pylist() == [0, None, None, None]


def test_missing_column_is_named(documents) -> None:
    with pytest.raises(InputError, match="needs the column 'url'; documents have id, source, text"):
        UrlDuplicates().keys(documents(["a"]), 0)
