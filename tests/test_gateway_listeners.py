"""Listening: what a user is told when it cannot be."""

from __future__ import annotations

import pytest

from gateway.listeners import ListenError, listen_tcp


def test_an_address_that_this_host_does_not_have_is_told_in_words() -> None:
    with pytest.raises(ListenError) as refused:
        listen_tcp("203.0.113.9:7070")  # of those that documentation may use: nobody has it
    assert str(refused.value) == (
        "cannot listen on 203.0.113.9:7070: this host has no such address; "
        "choose another with --listen or the key listen under [http]"
    )
