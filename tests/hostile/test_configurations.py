"""Configurations from a stranger: read to their end or refused with what is wrong, and nothing of another file told."""

import os

import pytest
from conftest import TINY
from refusal import refused, sparse

from asc_ray.config.composition import load_config
from asc_ray.config.yaml_text import read_yaml

pytestmark = pytest.mark.timeout(60)


def doubling(line):
    """An anchor, and 24 lines of which each has the one before twice."""
    return "v0: &v0 {x: 1}\n" + "".join(line.format(n=n, m=n + 1) + "\n" for n in range(24))


SECRET = "hunter2-of-root"
TEXTS = {
    "a key twice": ("name: a\nstorage: /s\nname: b\n", "the key name is there twice, in line 1 and line 3"),
    "a deep key twice": ("student:\n  seed: 1\n  seed: 2\n", "the key seed is there twice, in line 2 and line 3"),
    "a list 5,000 deep": ("[" * 5000 + "]" * 5000, "deeper than 32 levels"),
    "mappings 5,000 deep": ("{a: " * 5000 + "1" + "}" * 5000, "deeper than 32 levels"),
    "open lists without end": ("- " * 5000, "deeper than 32 levels"),
    "an anchor bomb": (doubling("v{m}: &v{m} [*v{n}, *v{n}]"), "with its aliases written out"),
    "a merge bomb": (doubling("v{m}: &v{m} {{<<: [*v{n}, *v{n}]}}"), "with its aliases written out"),
    "a value that contains itself": ("a: &a [*a]", "a value that contains itself"),
    "a Python object": ("a: !!python/object/apply:os.system ['touch CANARY']", "could not determine a constructor"),
    "a Python name": ("a: !!python/name:os.system", "could not determine a constructor"),
    "a tag of nobody": ("a: !evil {b: 1}", "could not determine a constructor"),
    "an alias of nothing": ("a: *nothing", "found undefined alias"),
    "a zero byte": ("name: 'a\0b'", "characters that are no text"),
    "an escaped zero byte": ('storage: "/tmp/a\\0b"', "a text with control characters"),
    "an escape sequence": ('name: "\\x1b[2J"', "a text with control characters"),
    "half a character": ('name: "\\ud800"', "a text with control characters"),
    "a number of 200,000 digits": ("a: 0x" + "f" * 200_000, "a date, a number or another value in it is none"),
    "a day that is none": ("a: 2026-13-45", "a date, a number or another value in it is none"),
    "a truth that is none": ("a: !!bool perhaps", "a date, a number or another value in it is none"),
    "a key that is a number": ("1: 2", "a key that is no word"),
    "a key that is a list": ("? [a, b]\n: 1", "a key that is no word"),
    "a key that yes is": ("yes: 1", "a key that is no word"),
    "a key twice in a merge": ("a: {<<: {x: 1, x: 2}}", "the key x is there twice"),
    "a number of 60 noughts": ("a: 0b" + "0" * 60 + "1", "another value in it is none"),
    "a number in base 60": ("a: 1" + ":1" * 100_000, "another value in it is none"),
    "a teacher above": ("base: demo\nteachers: {systems: [../secret]}", "expected names, and no paths"),
    "two documents": ("--- a\n--- b", "not valid YAML"),
    "a list": ("- a", "expected a mapping of keys to values, found list"),
    "a text": ("just words", "expected a mapping of keys to values, found str"),
    "the home of nobody": ("base: demo\nstorage: ~nosuchuser/x", "~nosuchuser is nobody's home"),
    "a network from the home of nobody": (
        "base: demo\nteachers: {override: {passt: {model: {pretrained: ~nosuchuser/x.pt}}}}",
        "~nosuchuser is nobody's home",
    ),
    "recipes of nothing": ("base: demo\nteachers: {recipes: null}", "teachers.recipes: expected a mapping"),
    "changes that are none": ("base: demo\nteachers: {override: {passt: 3}}", "teachers.override.passt: expected"),
    "changes in a list": ("base: demo\nteachers: {override: [1]}", "teachers.override: expected a mapping"),
    "a student of nothing": ("base: demo\nstudent: null", "student"),
    "a base in a mapping": ("base: {a: b}", "base: expected a file's or a preset's name"),
    "a base of numbers": ("base: [1]", "base: expected a file's or a preset's name"),
    "a name of 5,000 characters": (f"base: {'x' * 5000}", "no such file"),
    "a base that is itself": ("base: c.yaml", "lead back to the file itself"),
    "too many values": ("a: [" + "1," * 30_000 + "]", "more than 20,000 values"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_a_strangers_configuration(tmp_path, canary, kind):
    text, message = TEXTS[kind]
    file = tmp_path / "c.yaml"
    file.write_text(text.replace("CANARY", str(canary)), encoding="utf-8")
    refused(lambda: load_config(file), "c.yaml", message, code=2)


def foreign(path, text):
    path.write_text(text)
    return path


FILES = {
    "a pipe": (os.mkfifo, "a named pipe, and not a plain file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device, and not a plain file"),
    "a file of 20 GB": (sparse, "allowed are 1,048,576"),
    "a link to itself": (lambda path: path.symlink_to(path), "no such file"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
    "a file of users": (lambda path: foreign(path, f"root:{SECRET}:19000:0:99999:7:::\n"), "is no configuration"),
    "a file of settings": (lambda path: foreign(path, f"token: {SECRET}\nhost: x\n"), "is no configuration"),
    "a key": (lambda path: foreign(path, f"-----BEGIN KEY-----\n{SECRET}\n-----END KEY-----\n"), "expected a mapping"),
    "broken settings": (lambda path: foreign(path, f"a: '{SECRET}\nb: {SECRET}"), "not valid YAML"),
    "settings with tabs": (lambda path: foreign(path, f"a:\n\t{SECRET}: x"), "not valid YAML"),
    "settings with an odd name": (lambda path: foreign(path, f"a: *{SECRET}"), "not valid YAML"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_base_that_is_no_configuration_is_not_read_out(tmp_path, kind):
    make, message = FILES[kind]
    make(tmp_path / "other.yaml")
    (tmp_path / "c.yaml").write_text("base: other.yaml")
    told = refused(lambda: load_config(tmp_path / "c.yaml"), message, code=2)
    assert SECRET not in told


@pytest.mark.parametrize("key", ["student.preset", "student.recipe", "sweep.preset"])
def test_a_preset_that_is_no_configuration_is_not_read_out(tmp_path, key):
    (tmp_path / "other.yaml").write_text(f"model: {SECRET}\nhost: {SECRET}\ntoken: {SECRET}\n")
    told = refused(
        lambda: load_config(TINY, [f"{key}={tmp_path}/other.yaml"]), "other.yaml is no configuration", code=2
    )
    assert SECRET not in told


@pytest.mark.parametrize(("links", "names"), [(1100, 1), (22, 2)], ids=["a chain", "a doubling"])
def test_bases_without_end(tmp_path, links, names):
    for number in range(links):
        (tmp_path / f"{number}.yaml").write_text(f"base: [{', '.join([f'{number + 1}.yaml'] * names)}]")
    (tmp_path / f"{links}.yaml").write_text("name: last")
    refused(lambda: load_config(tmp_path / "0.yaml"), "leads to more than 64 files", code=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.seed=[" * 1 + "[" * 3000, "deeper than 32 levels"),
        ("name=!!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("name={a: 1, a: 2}", "the key a is there twice"),
        ("storage=~nosuchuser/x", "~nosuchuser is nobody's home"),
        ("tracking=http://me:hunter2@host", "found 'http://***@host'"),
        ('name="\\e[2J"', "a text with control characters"),
    ],
    ids=["depth", "object", "twice", "home", "secret", "escape"],
)
def test_a_strangers_override(override, message):
    refused(lambda: load_config(TINY, [override]), message, code=2)


def test_a_section_whose_lines_are_all_commented_out_is_a_null_and_takes_the_base_s_away(tmp_path):
    (tmp_path / "c.yaml").write_text(f"base: {TINY}\nteachers:\n  override:\n    # passt: {{}}\n")
    recipe = load_config(tmp_path / "c.yaml").teachers.recipes["passt_dirfms_1"]
    assert (recipe.model.depth, recipe.optimizer.epochs) == (12, 25)


def test_what_people_write_is_read():
    """Anchors, merges, quotes, several lines."""
    text = "a: &a {x: 1, y: [1, 2.5, null, true]}\nb: {<<: *a, x: 2}\nc: |\n  two\n  lines\n'1': one\nd: ä ö\n"
    assert read_yaml(text, "here") == {
        "a": {"x": 1, "y": [1, 2.5, None, True]}, "b": {"x": 2, "y": [1, 2.5, None, True]}, "c": "two\nlines\n",
        "1": "one", "d": "ä ö",
    }  # fmt: skip
