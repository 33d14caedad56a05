"""Stop strings over a decoder whose output depends on the tokens before."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from effc.runtime.text import Watch

WORDS = [b"a", b"b", "é".encode()[:1], "é".encode()[1:], b" ab", "日".encode()[:2], "日".encode()[2:]]


def decode(ids: Sequence[int]) -> str:
    """Bytes to text as byte-level tokenizers do it: broken characters show as such until they are whole."""
    return b"".join(WORDS[i] for i in ids).decode(errors="replace")


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=40))
@settings(deadline=None, max_examples=100)
def test_the_text_is_that_of_all_tokens_at_once(ids: list[int]) -> None:
    watch = Watch(decode)
    for count in range(len(ids) + 1):
        assert watch.see(ids[:count]) is None
    assert watch.text == decode(ids)


@given(st.lists(st.integers(0, 1), max_size=40), st.text("ab", min_size=1, max_size=3))
@settings(deadline=None, max_examples=100)
def test_the_text_ends_before_the_first_stop_string(ids: list[int], stop: str) -> None:
    watch, whole, cut = Watch(decode, [stop]), decode(ids), None
    for count in range(1, len(ids) + 1):
        safe = watch.safe(count - 1)
        assert stop not in decode(ids[:safe])
        cut = watch.see(ids[:count])
        if cut is not None:
            break
    assert (cut is None) == (stop not in whole)
    assert watch.text == whole.split(stop)[0]
    assert cut is None or decode(ids[:cut]) == watch.text
