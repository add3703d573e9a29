"""Specs from YAML and JSON: what is read, and what each mistake is told."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.shape import Problem
from gateway.specfile import SpecError, parse_specs, spec_to_yaml
from pool.spec import FcSpec, FunctionSpec, MountSpec, PoolSpec, QueueSpec, SecuritySpec, WebSpec

EVERY_KEY = Path(__file__).parent.parent / "examples" / "every-key.yaml"

FULL = """\
name: resize            # a comment
image: registry.example/resize:1
env:
  LIMIT: 8080
  RATE: 1.10
  DEBUG: true
  ANSWER: no
  TIME: 22:22
  EMPTY: ""
command: [serve, --threads, 4]
timeout_s: 5
concurrency: 4
pool: {min: 1, max: 3, freeze_after_s: null}
queue:
  max: 0
security:
  user: 1000
mounts:
  - source: /srv/data
    target: /data
"""


def problems_of(text: str, source: str = "fn.yaml") -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        parse_specs(text, source)
    return caught.value.problems


def only_problem(text: str, source: str = "fn.yaml") -> str:
    (problem,) = problems_of(text, source)
    return str(problem)


def test_a_full_spec_is_read() -> None:
    (spec,) = parse_specs(FULL, "fn.yaml")
    assert spec == FunctionSpec(
        name="resize",
        image="registry.example/resize:1",
        env={"LIMIT": "8080", "RATE": "1.10", "DEBUG": "true", "ANSWER": "no", "TIME": "22:22", "EMPTY": ""},
        command=("serve", "--threads", "4"),
        timeout_s=5.0,
        concurrency=4,
        pool=PoolSpec(min=1, max=3, freeze_after_s=None),
        queue=QueueSpec(max=0),
        security=SecuritySpec(user="1000"),
        mounts=(MountSpec(source="/srv/data", target="/data"),),
    )


def test_several_documents_anchors_and_empty_documents() -> None:
    text = "---\nname: a\nimage: x\nenv: &e {A: b}\n---\n# nothing\n---\nname: b\ncode: ./b\nenv: {A: c}\n"
    assert [spec.name for spec in parse_specs(text, "f")] == ["a", "b"]
    (spec,) = parse_specs("name: a\nimage: &i x\ncommand: [*i, *i]\n", "f")
    assert spec.command == ("x", "x")


def test_json_is_read_as_json() -> None:
    text = json.dumps({"name": "a", "image": "x", "env": {"N": 1.5, "T": True, "S": "\U0001f600/"}}, indent="\t")
    (spec,) = parse_specs(text, "fn.json")
    assert spec.env == {"N": "1.5", "T": "true", "S": "\U0001f600/"}


def test_yaml_that_begins_with_a_brace_is_read_too() -> None:
    assert parse_specs("{name: a, image: x}", "f")[0].name == "a"


def test_every_problem_is_told_at_once_in_the_order_of_lines() -> None:
    text = """\
nam: a
image: 1.5
pool:
  mx: 4
  min: -1
timeout_s: 30s
security:
  read_only: no
env: [A=b]
"""
    with pytest.raises(SpecError) as caught:
        parse_specs(text, "fn.yaml")
    assert str(caught.value).splitlines() == [
        "fn.yaml:1: name: this key is missing",
        "fn.yaml:1: nam: unknown key (did you mean name?)",
        'fn.yaml:2: image: a text is needed, this is the number 1.5 (put it in quotes: "1.5")',
        "fn.yaml:4: pool.mx: unknown key (did you mean max?)",
        "fn.yaml:5: pool.min: must be at least 0, this is -1",
        'fn.yaml:6: timeout_s: a number is needed, this is the text "30s" (write 30, a number of seconds)',
        'fn.yaml:8: security.read_only: true or false is needed, this is the text "no" '
        "(write false: no is a text here, unlike in YAML 1.1)",
        "fn.yaml:9: env: a mapping is needed, this is a list (write NAME: value lines, without dashes)",
    ]


def test_columns_point_at_the_value() -> None:
    (problem,) = problems_of("name: a\nimage: x\npool:\n  max: many\n")
    assert (problem.line, problem.column, problem.path) == (4, 8, "pool.max")


HEAD = "name: a\nimage: x\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("memory_mb: 256m", 'this is the text "256m" (write 256, a number of megabytes)'),
        ("memory_mb: 1g", "(write 1024, a number of megabytes)"),
        ("memory_mb: 1GiB", "(write 1024, a number of megabytes)"),
        ('memory_mb: "256"', "(write 256, without quotes)"),
        ("memory_mb: 1.5", "a whole number is needed, this is 1.5"),
        ("memory_mb: 256.0", "(write 256)"),
        ("memory_mb: true", "a whole number is needed, this is true"),
        ("memory_mb: 2", "must be at least 4, this is 2"),
        ("timeout_s: 500ms", "(write 0.5, a number of seconds)"),
        ("timeout_s: 0", "must be more than 0, this is 0"),
        ("timeout_s: .inf", 'a number is needed, this is the text ".inf"'),
        ("timeout_s: 1e999", "a finite number is needed"),
        ("port: 70000", "port: must be at most 65535, this is 70000"),
        ("port: [80]", "a whole number is needed, this is a list"),
        ("environment: {A: b}", "environment: unknown key (did you mean env?)"),
        ("mem_limit: 1", "(did you mean memory_mb?)"),
        ("zzz: 1", "zzz: unknown key (known here: name, image"),
        ("<<: {}", "merging with << is not supported (write the keys out)"),
        ("env: {A: }", 'env.A: a text is needed, this is empty (write "" for an empty text, or leave the key out)'),
        ("env: {A: [1]}", "env.A: a text is needed, this is a list"),
        ("env: {1A: b}", "env.1A: is no name for an environment variable"),
        ('env: {"A=B": b}', "env.A=B: is no name"),
        ('env: {A: "a\\0b"}', "must not contain a NUL character"),
        ("command: node a.js", 'is needed, this is the text "node a.js" (write a list: ["node","a.js"])'),
        ("entrypoint: []", "entrypoint: must not be empty"),
        ("pool: 3", "pool: a mapping is needed, this is the number 3 (its keys: min, max"),
        ("pool: {min: 5, max: 2}", "pool.min: min 5 is more than max 2"),
        ("reserved: 11", "reserved: 11 can never be used (10 instances with 1 at a time serve 10)"),
        ("pool: {max_memory_mb: 256}", "pool.max_memory_mb: 256 would never be reached"),
        ("pool: {keepalive: lur}", "pool.keepalive: there is no keep-alive policy lur (did you mean lru?)"),
        ("contract: wbe", "contract: there is no contract wbe (did you mean web?)"),
        ("contract: nothing-like", "there is no contract nothing-like (there are: "),
        ("env: {PORT: 80}", "env.PORT: set by poold"),
        ("network: host", "network: host is refused"),
        ("network: container:x", "network: is no name of a network"),
        ("workdir: app", 'workdir: "app" does not fit: must begin with /'),
        ("tenant: a b", "tenant: \"a b\" does not fit: letters, digits"),
        ('tenant: "a\\n"', "does not fit"),
        ("mounts: [{source: /a, target: /}]", "mounts[0].target: cannot be the root itself"),
        ("mounts: [{source: /a, target: /b}, {source: /c, target: /b/}]", "mounts[1].target: /b is mounted twice"),
        ("mounts: [{source: /a}]", "mounts[0].target: this key is missing"),
        ("mounts: ['/a:/b:ro']", "mounts[0]: a mapping is needed"),
        ("security: {user: root}", "security.user: must be uid or uid:gid, in numbers"),
        ("security: {user: 0}", "security.user: 0 is root, which is refused"),
        ("security: {cap_add: [net admin]}", "security.cap_add[0]: is no name of a capability"),
        ("fc: {type: evnt}", 'fc.type: must be one of event, http, this is the text "evnt" (did you mean event?)'),
        ("fc: {type: http}", "fc: has no effect with contract web"),
        ("code: ''", "code: must not be empty"),
        ("image: a b", "fn.yaml:3: image: the key is there twice, first in line 2 (keep one of them)"),
        ("description: !!python/object:os.system x", "is not supported"),
        ("? [a]\n: b", "a key must be a plain word"),
        ("\tport: 1", "YAML indents with spaces, not with tabs"),
        ("env: a: b", "not readable as YAML"),
        ("port: \x07", "the character U+0007 is not allowed in YAML"),
        ("env: {A: &a [*a]}", "too many values, or too deeply nested"),
    ],
)  # fmt: skip
def test_one_mistake(line: str, expected: str) -> None:
    message = only_problem(HEAD + line + "\n")
    assert expected in message
    assert message.startswith("fn.yaml:3")


def test_neither_image_nor_code() -> None:
    assert only_problem("name: a\n").startswith("fn.yaml:1: neither image nor code is given (image: names what to run")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n", "null"])
def test_nothing_in_it(text: str) -> None:
    assert only_problem(text) == "fn.yaml: there is no function spec in it"


@pytest.mark.parametrize("text", ["- name: a\n", "hello", "42", "[]"])
def test_not_a_mapping(text: str) -> None:
    assert "a mapping is needed" in only_problem(text)


def test_problems_of_all_documents_and_a_name_given_twice() -> None:
    text = "name: a\nimage: x\n---\nname: a\nimage: y\n---\nname: c\nimag: y\n"
    assert [str(p).split(" (")[0] for p in problems_of(text)] == [
        "fn.yaml:4: name: a is there twice, first in line 1",
        "fn.yaml:8: imag: unknown key",
    ]


def test_a_flood_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 9)]
    assert "too many values" in only_problem("\n".join(lines))


def test_deep_nesting_and_size_are_refused() -> None:
    assert "nested" in only_problem("a: " + "[" * 5_000)
    assert "nested" in only_problem('{"a": ' + "[" * 500 + "]" * 500 + "}", "a.json")
    assert "larger than 256 KB" in only_problem("#" * 300_000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "a",\n "image": }', "body:2: not readable as JSON: expecting value"),
        ('{"name": "a",\n "image": "x",\n "name": "b"}', "body:3: name: the key is there twice, first in line 1"),
        ('{"name": "a",\n "image": "x",\n "env": {"A": null}}', "body:3: env.A: a text is needed, this is empty"),
        ('{"name": 5,\n "image": "x"}', "body:1: name: a text is needed, this is the number 5"),
        ('{"name": "a", "image": "x", "description": "\\ud800"}', "half a surrogate pair"),
        ('{"name": "a", "image": "x", "timeout_s": NaN}', "a finite number is needed"),
        ('["a", {"b": 1}, []]', "a mapping is needed, this is a list"),
    ],
)
def test_json_mistakes(text: str, expected: str) -> None:
    assert expected in only_problem(text, "body")


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
tricky = st.sampled_from(
    ["no", "1e3", "0o17", "22:22", "~", "null", "true", "1_000", "2026-11-21", " a ", "a: b", "#", ""]
)
specs = st.builds(
    FunctionSpec,
    name=names,
    image=st.from_regex(r"[a-z0-9]{1,10}(:[a-z0-9.]{1,5})?", fullmatch=True),
    description=texts | tricky,
    env=st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,10}", fullmatch=True), texts | tricky, max_size=4),
    command=st.none() | st.lists(texts | tricky, max_size=3).map(tuple),
    timeout_s=st.floats(min_value=1e-9, max_value=86_400) | st.integers(1, 100).map(float),
    pool=st.builds(
        PoolSpec, freeze_after_s=st.none() | st.just(0.0), keepalive_s=st.floats(min_value=0.1, max_value=1e20)
    ),
    web=st.builds(WebSpec, invoke_path=st.from_regex(r"\A/[!$-~]{0,20}\Z")),
)


@settings(max_examples=150, deadline=None)
@given(specs)
def test_a_spec_written_and_read_again_is_the_same(spec: FunctionSpec) -> None:
    assert parse_specs(spec_to_yaml(spec), "again") == [spec]
    assert parse_specs(msgspec.json.encode(spec).decode(), "again.json") == [spec]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="{}[]:,-\"'&*#|>\n a1?!%@`", max_size=60))
def test_any_text_is_read_or_refused_as_a_spec(text: str) -> None:
    with contextlib.suppress(SpecError):
        parse_specs(text, "any")
    with contextlib.suppress(SpecError):
        parse_specs(text, "any.json")


def test_the_example_of_every_key_has_every_key_with_its_default() -> None:
    text = EVERY_KEY.read_text()
    code = "node-http/code"
    assert parse_specs(text, "f") == [FunctionSpec(name="every-key", code=code)]
    before, _, fc = text.partition("# fc:")
    with_fc = (
        before.replace("contract: web #", "contract: fc #").partition("\nweb:")[0] + "\nfc:" + fc.replace("\n#", "\n")
    )
    assert parse_specs(with_fc, "f") == [FunctionSpec(name="every-key", code=code, contract="fc")]
    for written, spec in ((yaml.safe_load(text), FunctionSpec), (yaml.safe_load(with_fc)["fc"], FcSpec)):
        keys = {field.name for field in msgspec.structs.fields(spec)}
        assert set(written) | ({"fc"} if spec is FunctionSpec else set()) == keys
    for section, kind in (("pool", PoolSpec), ("queue", QueueSpec), ("security", SecuritySpec), ("web", WebSpec)):
        assert set(yaml.safe_load(text)[section]) == {field.name for field in msgspec.structs.fields(kind)}
