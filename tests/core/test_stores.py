"""Which backends keep their models in one place."""

from __future__ import annotations

from balancer.core.stores import Keeper, groups


def keeper(name: str, host: str, *models: str, store: str = "") -> Keeper:
    return Keeper(name, store, host, frozenset((model, "d") for model in models))


def test_the_same_host_with_the_same_list_is_one_store() -> None:
    """One Ollama per GPU, one directory of models."""
    assert groups([keeper("a", "box", "m"), keeper("b", "box", "m")]) == [["a", "b"]]


def test_another_list_or_host_is_another_store() -> None:
    """What differs cannot be the same directory."""
    found = groups([keeper("a", "box", "m"), keeper("b", "box"), keeper("c", "nas", "m")])
    assert found == [["a"], ["b"], ["c"]]


def test_a_name_decides() -> None:
    """The operator knows of network file systems, and of containers."""
    found = groups([keeper("a", "box", store="nfs"), keeper("b", "nas", "m", store="nfs")])
    assert found == [["a", "b"]]
    assert groups([keeper("a", "box", store="1"), keeper("b", "box", store="2")]) == [["a"], ["b"]]
