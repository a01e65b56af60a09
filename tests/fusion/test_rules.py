from pathlib import Path

import pytest
from pydantic import ValidationError

from graftllm.errors import FusionError
from graftllm.fusion.rules import Rule, first_fitting, read_rules
from graftllm.records import Message


def _talk(*contents: str, system: str = "") -> list[Message]:
    first = [Message(role="system", content=system)] if system else []
    roles = ("user", "assistant")
    return first + [Message(role=roles[i % 2], content=content) for i, content in enumerate(contents)]


def test_a_pattern_is_sought_in_the_last_user_message() -> None:
    rule = Rule(pack="math", pattern=r"\d+ \+ \d+")
    assert rule.fits(_talk("what is 3 + 4?"))
    assert not rule.fits(_talk("3 + 4", "7", "thanks"))
    assert not rule.fits(_talk("hello", system="3 + 4"))


def test_a_tag_is_sought_in_the_system_prompt() -> None:
    rule = Rule(pack="code", tag="[code]")
    assert rule.fits(_talk("hi", system="You are [code] now."))
    assert not rule.fits(_talk("[code] hi"))


def test_a_pattern_and_a_tag_must_both_be_found() -> None:
    rule = Rule(pack="code", tag="[code]", pattern="^fix")
    assert rule.fits(_talk("fix it", system="[code]"))
    assert not rule.fits(_talk("fix it"))
    assert not rule.fits(_talk("no", system="[code]"))


def test_the_first_rule_that_fits_decides() -> None:
    rules = [Rule(pack="a", pattern="x"), Rule(pack="base", pattern="y"), Rule(pack="b", pattern="x|y")]
    assert first_fitting(rules, _talk("yx")) is rules[0]
    assert first_fitting(rules, _talk("y")) is rules[1]
    assert first_fitting(rules, _talk("z")) is None


def test_rules_are_read_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("- {pack: math, pattern: '^solve'}\n- pack: base\n  tag: plain\n")
    assert read_rules(tmp_path / "rules.yaml") == (Rule(pack="math", pattern="^solve"), Rule(pack="base", tag="plain"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "expected a list of rules, each with pack, and pattern or tag; found nothing; write .. to take all"),
        ("pack: math", "expected a list of rules, each with pack, and pattern or tag; found dict"),
        ("- {pack: math, regex: x}", "rule 1: unknown key 'regex'; expected pack, pattern and tag"),
        ("- {pack: a, tag: b}\n- {pack: math}", "rule 2: expected a pattern, a tag or both, found neither"),
        ("- {pack: math, pattern: '('}", r"rule 1: pattern '\(' is no regular expression \("),
        (
            "- {pack: a, pattern: 'a{99999999999999999999}'}",
            "rule 1: pattern 'a{9+}' is no regular expression \\(the rep",
        ),
        (
            f"- {{pack: a, pattern: '{'(' * 3000}{')' * 3000}'}}",
            r"rule 1: pattern '\(+' is no regular expression \(max",
        ),
        ("[" * 3000, "not readable as YAML \\(maximum recursion depth"),
        ("- {pack: a, tag: 2020-99-99}", "not readable as YAML \\(month must be"),
        ("- {pattern: x}", "rule 1: pack: Field required"),
        ("- {pack: 3, pattern: x}", "rule 1: pack: Input should be a valid string"),
        ("- math", "rule 1: Input should be a valid dictionary"),
        ("- {pack: [", "not readable as YAML"),
        ("- {pack: a, tag: b, tag: c}", "key 'tag' stands twice"),
    ],
)
def test_what_is_wrong_with_a_rule_is_named(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(FusionError, match=error):
        read_rules(tmp_path / "rules.yaml")
    with pytest.raises(FusionError, match="nothing.yaml: no such file; expected a list of rules"):
        read_rules(tmp_path / "nothing.yaml")


def test_a_manifest_cannot_hold_a_rule_that_never_fits() -> None:
    with pytest.raises(ValidationError, match="found neither"):
        Rule(pack="math")
