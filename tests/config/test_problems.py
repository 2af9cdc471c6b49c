from balancer.config.problems import ConfigError, Problem, dotted, shown, suggestion


def test_a_problem_in_a_file_reads_like_a_compilers() -> None:
    """File, line and column come first, so that editors and terminals make a link of them."""
    problem = Problem("config.yaml", 8, 5, "backends[1].wieght", "unknown key.")
    assert str(problem) == "config.yaml:8:5 backends[1].wieght: unknown key."


def test_a_problem_outside_files_names_its_source_alone() -> None:
    """A variable has no lines."""
    problem = Problem("BALANCER_LISTEN", None, None, "server.listen", "is empty.")
    assert str(problem) == "BALANCER_LISTEN server.listen: is empty."


def test_a_problem_without_path_has_no_colon_too_many() -> None:
    """A fault of the whole text concerns no key."""
    assert str(Problem("c.yaml", 1, 2, "", "not valid YAML.")) == "c.yaml:1:2 not valid YAML."


def test_the_error_tells_every_problem_on_a_line_of_its_own() -> None:
    """Printing the exception is enough to show all."""
    one, two = (Problem("c", n, 1, "", "bad.") for n in (1, 2))
    error = ConfigError([one, two])
    assert error.problems == (one, two)
    assert str(error) == "c:1:1 bad.\nc:2:1 bad."


def test_paths_are_written_with_dots_and_brackets() -> None:
    """Indexes stand in brackets, keys behind dots."""
    assert dotted(("auth", "keys", 0, "name")) == "auth.keys[0].name"
    assert dotted(()) == ""


def test_only_near_words_are_suggested() -> None:
    """A far-fetched guess would mislead."""
    assert suggestion("wieght", ["weight", "name"]) == ' Did you mean "weight"?'
    assert suggestion("zebra", ["weight", "name"]) == ""


def test_shown_values_are_short_and_on_one_line() -> None:
    """A refused value cannot flood, break or crash the output."""
    assert shown("a\nb") == '"a\\nb"'
    assert shown(None) == "null"
    assert shown(value=True) == "true"
    assert len(shown("x" * 1000)) < 100
    assert shown("\ud800").isascii()
