"""The configuration: what wins over what, and what a mistake is told."""

from __future__ import annotations

import os
import string
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksi.config import reader as module
from ksi.config.addresses import shown_url
from ksi.config.reader import find_home, load, options_of
from ksi.config.salvage import salvage
from ksi.config.schema import Config, ProviderConfig
from ksi.errors import ConfigError
from tests.effort import effort

NOWHERE = Path("/nowhere/ksi-home")
"""A home without a file."""

SECTIONS = {name: type(value) for name, value in msgspec.structs.asdict(Config(home=NOWHERE)).items()}
SECTIONS = {name: kind for name, kind in SECTIONS.items() if issubclass(kind, msgspec.Struct)}
KEYS = [(section, field) for section, kind in SECTIONS.items() for field in msgspec.structs.fields(kind)]
NUMBERS = [
    (section, field.name) for section, field in KEYS if field.type in (int, float, int | None) and field.name != "rate"
]
TIMES = [(section, field.name) for section, field in KEYS if field.type is float and field.name != "rate"]


def home_with(folder: Path, text: str) -> Path:
    (folder / "ksi.toml").write_text(text, "utf-8")
    return folder


def refused(text: str = "", environ: dict[str, str] | None = None, *, home: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(home_with(home, text), environ or {})
    return caught.value


# -- what wins --------------------------------------------------------------------------------------------------------


def test_without_a_file_everything_has_its_default_and_a_small_model_answers() -> None:
    config = load(NOWHERE, {})
    assert config.home == NOWHERE
    assert config.queue.max_queued == 1_000_000
    assert config.store.url == "sqlite:///var/db/ksi.db"
    assert dict(config.providers) == {
        "local": ProviderConfig(kind="local", models=("local/smollm2",), max_concurrency=2)
    }
    assert dict(config.models) == {}


LAYERS = ("default", "file", "environment", "flag")


@settings(max_examples=effort(30, 300))
@given(
    values=st.lists(st.integers(1, 10**6), min_size=4, max_size=4, unique=True),
    given_in=st.sets(st.sampled_from(LAYERS[1:])),
)
def test_flags_win_over_variables_over_the_file_over_defaults(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], given_in: set[str]
) -> None:
    by_layer = dict(zip(LAYERS, values, strict=True)) | {"default": 1_000_000}
    home = NOWHERE
    if "file" in given_in:
        home = home_with(tmp_path_factory.mktemp("home"), f"[queue]\nmax_queued = {by_layer['file']}\n")
    environ = {"KSI_QUEUE__MAX_QUEUED": str(by_layer["environment"])} if "environment" in given_in else {}
    flags = {"queue": {"max_queued": by_layer["flag"]}} if "flag" in given_in else {}
    winner = [layer for layer in LAYERS if layer == "default" or layer in given_in][-1]
    assert load(home, environ, flags).queue.max_queued == by_layer[winner]


def test_a_layer_changes_only_the_keys_it_names(tmp_path: Path) -> None:
    home = home_with(tmp_path, "[queue]\nmax_queued = 5\nlease = 7\n[queue.head_start]\nhigh = 50000\nlow = 20\n")
    config = load(home, {"KSI_QUEUE__LEASE": "8", "KSI_QUEUE__HEAD_START__LOW": "30"}, {"queue": {"max_queued": 9}})
    assert (config.queue.max_queued, config.queue.lease) == (9, 8)
    assert (config.queue.head_start.high, config.queue.head_start.low) == (50_000, 30)


def test_variables_are_read_from_the_process_if_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KSI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KSI_LOCK__EXPIRY", "12.5")
    assert load(NOWHERE).lock.expiry == 12.5


def test_variables_without_a_section_or_of_others_are_ignored() -> None:
    assert load(NOWHERE, {"KSI_HOME": "/x", "KSI_TOKEN": "s", "OTHER__KEY": "1", "ksi_queue__lease": "9"}) == load(
        NOWHERE, {}
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("sqlite:///other.db", "sqlite:///other.db"),
        ("'sqlite:///quoted.db'", "sqlite:///quoted.db"),
        ('"redis://host"', "redis://host"),
        ("", ""),
        ("two words", "two words"),
    ],
)
def test_a_variable_is_read_as_toml_and_else_as_plain_text(text: str, value: str) -> None:
    assert load(NOWHERE, {"KSI_STORE__URL": text}).store.url == value


def test_a_variable_reaches_into_a_provider_whose_name_has_a_dash(tmp_path: Path) -> None:
    home = home_with(tmp_path, '[providers.claude-cli]\nkind = "claude-cli"\n')
    environ = {
        "KSI_PROVIDERS__CLAUDE_CLI__MAX_CONCURRENCY": "9",
        "KSI_PROVIDERS__CLAUDE_CLI__COMMAND": '["claude", "--verbose"]',
    }
    provider = load(home, environ).providers["claude-cli"]
    assert provider.max_concurrency == 9
    assert provider.options == {"command": ["claude", "--verbose"]}


def test_a_file_that_names_providers_has_only_those(tmp_path: Path) -> None:
    home = home_with(tmp_path, '[providers.team]\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n')
    providers = load(home, {}).providers
    assert list(providers) == ["team"]
    assert providers["team"].models == ("team/*",)
    assert providers["team"].options == {"base_url": "http://127.0.0.1:9/v1"}


def test_a_providers_priority_may_be_any_whole_number(tmp_path: Path) -> None:
    home = home_with(
        tmp_path, '[providers.a]\nkind = "stub"\npriority = 0\n[providers.b]\nkind = "stub"\npriority = -3\n'
    )
    assert [provider.priority for provider in load(home, {}).providers.values()] == [0, -3]


def test_a_model_can_have_fallbacks(tmp_path: Path) -> None:
    home = home_with(tmp_path, '[models."team/big"]\nfallbacks = ["team/small", "local/smollm2"]\n')
    assert load(home, {}).models["team/big"].fallbacks == ("team/small", "local/smollm2")


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_misspelt_key_is_refused_with_its_place_and_the_nearest_name(tmp_path: Path) -> None:
    for section, field in KEYS:
        error = refused(f"[{section}]\n{field.name}z = 1\n", home=tmp_path)
        assert error.place == f"{section}.{field.name}z"
        assert f"'{section}.{field.name}z'" in error.message
        assert f"did you mean '{section}.{field.name}'" in error.message
        assert str(tmp_path / "ksi.toml") in error.message


def test_a_key_in_another_section_than_its_own_is_refused_with_its_home(tmp_path: Path) -> None:
    for text in ('[service]\nnode_id = "a"\n', 'node_id = "a"\n[service]\nversion = 2\n'):
        assert "did you mean 'store.node_id'" in refused(text, home=tmp_path).message


@settings(max_examples=effort(50, 500))
@given(key=st.text(string.ascii_lowercase + "_", min_size=1, max_size=30), section=st.sampled_from(sorted(SECTIONS)))
def test_no_unknown_key_is_ever_taken(key: str, section: str) -> None:
    known = {field.name for field in msgspec.structs.fields(SECTIONS[section])}
    if key in known:
        return
    with pytest.raises(ConfigError) as caught:
        load(NOWHERE, {}, {section: {key: 1}})
    assert caught.value.place == f"{section}.{key}"


@pytest.mark.parametrize(
    ("text", "place", "guess"),
    [
        ("[queues]\nlease = 1\n", "queues", "'queue'"),
        ("lease = 1\n", "lease", ""),
        ("[queue.head_start]\nhihg = 1\n", "queue.head_start.hihg", "'queue.head_start.high'"),
        ('[models."a/b"]\nfallback = ["c/d"]\n', "models.a/b.fallback", "'models.a/b.fallbacks'"),
    ],
)
def test_an_unknown_name_is_refused_wherever_it_stands(tmp_path: Path, text: str, place: str, guess: str) -> None:
    error = refused(text, home=tmp_path)
    assert error.place == place
    assert guess in error.message


def test_a_wrong_variable_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    error = refused("[queue]\nlease = 5\n", {"KSI_QUEUE__LEESE": "1"}, home=tmp_path)
    assert error.place == "queue.leese"
    assert "KSI_QUEUE__LEESE" in error.message
    assert "ksi.toml" not in error.message


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(home_with(tmp_path, "[queue]\nlease = 5\n"), {}, {"queue": {"lease": "soon"}})
    assert caught.value.place == "queue.lease"
    assert "ksi.toml" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[queue]\nlease = "soon"\n', "queue.lease"),
        ('[store]\ndurability = "some"\n', "store.durability"),
        ("queue = 5\n", "queue"),
        ("providers = 5\n", "providers"),
        ("[providers]\nstub = 5\n", "providers.stub"),
        ("[providers.stub]\n", "providers.stub.kind"),
        ('[providers.stub]\nkind = "stub"\nmodels = "stub/*"\n', "providers.stub.models"),
        ('[providers.stub]\nkind = "stub"\nmodels = ["a/*", 5]\n', "providers.stub.models[1]"),
        ('[providers."a b"]\nkind = "stub"\n', "providers.a b"),
        ('[providers."a,b"]\nkind = "stub"\n', "providers.a,b"),
        ('[providers.""]\nkind = "stub"\n', "providers."),
        ("models = 5\n", "models"),
        ('[models."a/b"]\nfallbacks = ["small"]\n', "models.a/b.fallbacks"),
        ('[models.big]\nfallbacks = ["a/b"]\n', "models.big.fallbacks"),
        ("[queue.head_start]\nnormal = 30000\n", "queue.head_start"),
        ("[queue.head_start]\nbackground = -1\n", "queue.head_start.background"),
        ("[queue]\nhead_start = 5\n", "queue.head_start"),
        ("[retention]\nfinished = 100\nsessions = 99\n", "retention.sessions"),
        ('[store]\nnode_id = "one\\ntwo"\n', "store.node_id"),
        ('[store]\nurl = "redis://localhost"\nnode_timeout = 29.0\n', "store.node_timeout"),
        ('[models."a/b"]\nfallbacks = ["a/b\\nc"]\n', "models.a/b.fallbacks"),
        ("[breaker]\nrate = 1.5\n", "breaker.rate"),
        ("[breaker]\nfailures = 21\n", "breaker.failures"),
        ("[breaker]\nrate = -0.1\n", "breaker.rate"),
        ('[providers.stub]\nkind = "stub"\nmax_concurrency = 0\n', "providers.stub.max_concurrency"),
        ('[providers.stub]\nkind = "stub"\nrequests_per_minute = -5\n', "providers.stub.requests_per_minute"),
        ('[providers.stub]\nkind = "stub"\ntokens_per_minute = -5\n', "providers.stub.tokens_per_minute"),
        ('[providers.stub]\nkind = "stub"\nrequests_per_minute = 0\n', "providers.stub.requests_per_minute"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(tmp_path: Path, text: str, place: str) -> None:
    error = refused(text, home=tmp_path)
    assert error.place == place
    assert place.partition(".")[2] in error.message


def test_no_number_may_be_negative() -> None:
    for section, key in NUMBERS:
        with pytest.raises(ConfigError) as caught:
            load(NOWHERE, {}, {section: {key: -1}})
        assert caught.value.place == f"{section}.{key}"


@pytest.mark.parametrize("value", ["nan", "inf", "1e300"])
def test_no_time_may_be_without_end(value: str) -> None:
    for section, key in TIMES:
        with pytest.raises(ConfigError) as caught:
            load(NOWHERE, {f"KSI_{section}__{key}".upper(): value})
        assert caught.value.place == f"{section}.{key}"


def test_a_variable_that_is_a_value_and_a_table_at_once_is_refused() -> None:
    environ = {"KSI_QUEUE__HEAD_START": "5", "KSI_QUEUE__HEAD_START__HIGH": "6"}
    with pytest.raises(ConfigError, match="KSI_QUEUE__HEAD_START__HIGH"):
        load(NOWHERE, environ)


def test_a_variable_that_makes_a_table_of_a_value_is_refused(tmp_path: Path) -> None:
    error = refused("[queue]\nlease = 5\n", {"KSI_QUEUE__LEASE__MORE": "1"}, home=tmp_path)
    assert error.place == "queue.lease"
    assert "KSI_QUEUE__LEASE__MORE" in error.message


def test_a_file_that_is_no_toml_is_refused_with_the_line(tmp_path: Path) -> None:
    error = refused("[queue]\nlease = \n", home=tmp_path)
    assert error.place == str(tmp_path / "ksi.toml")
    assert "line 2" in error.message


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ksi.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, {})


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ksi.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, {})


# -- a provider's own options -----------------------------------------------------------------------------------------


class Own(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of provider knows."""

    base_url: str = ""
    retries: int = 0


def test_a_providers_own_options_become_its_type() -> None:
    config = ProviderConfig(kind="own", models=("own/*",), options={"base_url": "http://127.0.0.1", "retries": 2})
    assert options_of(config, Own, "team", {}) == Own(base_url="http://127.0.0.1", retries=2)


def test_a_misspelt_option_is_refused_with_the_nearest_of_its_kind_or_of_all_providers() -> None:
    for wrong, right in (("base_ulr", "base_url"), ("max_concurency", "max_concurrency")):
        with pytest.raises(ConfigError, match=f"did you mean 'providers.team.{right}'") as caught:
            options_of(ProviderConfig(kind="own", models=(), options={wrong: 1}), Own, "team", {})
        assert caught.value.place == f"providers.team.{wrong}"


def test_an_option_of_the_wrong_type_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        options_of(ProviderConfig(kind="own", models=(), options={"retries": "many"}), Own, "team", {})
    assert caught.value.place == "providers.team.retries"


def test_a_wrong_option_from_a_variable_names_the_variable() -> None:
    config = ProviderConfig(kind="own", models=(), options={"retries": "many"})
    with pytest.raises(ConfigError, match="KSI_PROVIDERS__TEAM__RETRIES"):
        options_of(config, Own, "team", {"KSI_PROVIDERS__TEAM__RETRIES": "many"})


# -- the home ---------------------------------------------------------------------------------------------------------


def test_a_home_that_is_given_wins_and_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_home("here", {"KSI_HOME": "/there"}, tmp_path) == tmp_path / "here"
    assert find_home(None, {"KSI_HOME": "/there"}, home_with(tmp_path, "")) == Path("/there")


def test_the_nearest_folder_upward_with_a_file_is_the_home(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    home_with(tmp_path, "")
    home_with(tmp_path / "a", "")
    assert find_home(None, {}, inner) == tmp_path / "a"


@pytest.mark.parametrize(
    ("environ", "home"),
    [
        ({"XDG_DATA_HOME": "/data", "HOME": "/home/u"}, "/data/ksi"),
        ({"HOME": "/home/u"}, "/home/u/.local/share/ksi"),
        ({"XDG_DATA_HOME": "", "KSI_HOME": "", "HOME": "/home/u"}, "/home/u/.local/share/ksi"),
    ],
)
def test_else_the_users_data_folder_is_the_home(tmp_path: Path, environ: dict[str, str], home: str) -> None:
    package = tmp_path / "lib" / "ksi" / "config" / "reader.py"  # as it is installed
    assert find_home(None, environ, tmp_path, package) == Path(home)


@pytest.mark.promise("U4")
def test_a_checkout_is_the_home_wherever_it_is_used_unless_a_home_is_here(tmp_path: Path) -> None:
    checkout, elsewhere, project = tmp_path / "checkout", tmp_path / "elsewhere", tmp_path / "project"
    for folder in (checkout / "src" / "ksi", elsewhere, project):
        folder.mkdir(parents=True)
    home_with(checkout, "")
    home_with(project, "")
    package = checkout / "src" / "ksi" / "config" / "reader.py"
    assert find_home(None, {}, elsewhere, package) == checkout
    assert find_home(None, {}, project, package) == project
    assert find_home(None, {"KSI_HOME": str(elsewhere)}, elsewhere, package) == elsewhere


@pytest.mark.promise("U4")
@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[socket]\npath = 'run/it.sock'\n[queue\nlease = 3\n", "run/it.sock"),
        ("[queue]\nleese = 3\n[socket]\npath = 'run/it.sock'\n", "run/it.sock"),
        ("[queue]\nlease =\n\n  [socket]\nmax_line = 1 2\npath = 'run/it.sock' # here\n", "run/it.sock"),
        ("[socket\npath = 'run/it.sock'\n", "var/run/daemon.sock"),
        ("[socket]\npath = 7\n", "var/run/daemon.sock"),
        ("\x00\xff", "var/run/daemon.sock"),
    ],
)
def test_the_socket_is_found_in_a_file_that_cannot_be_used(tmp_path: Path, text: str, path: str) -> None:
    home = home_with(tmp_path, text)
    with pytest.raises(ConfigError):
        load(home, {})
    assert salvage(home, {}).socket_path == home / path
    assert salvage(home, {"KSI_SOCKET__PATH": "other.sock"}).socket_path == home / "other.sock"


@pytest.mark.promise("U4", "S3")
@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///var/db/ksi.db", "sqlite:///var/db/ksi.db"),
        ("redis://valkey.example:7000/0?namespace=team", "redis://valkey.example:7000/0?namespace=team"),
        ("redis://user:SECRET@valkey.example/0", "redis://***@valkey.example/0"),
        ("redis://SECRET@valkey.example", "redis://***@valkey.example"),
        ("redis://:SEC@RE/T@valkey.example/0", "redis://***@valkey.example/0"),
        ("redis://:SEC?RET@valkey.example/0", "redis://***"),
        ("redis+sentinel://a:1,b:2/it?sentinel_password=SECRET", "redis+sentinel://a:1,b:2/it?sentinel_password=***"),
        ("https://api.example/v1?key=SECRET&SECRET&db=1#SECRET", "https://api.example/v1?key=***&***&db=1"),
        ("https://api.example/v1#SECRET", "https://api.example/v1"),
        ("user:SECRET@valkey.example:6379", "***"),
        ("redis:/user:SECRET@valkey.example", "***"),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_possible_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown


@pytest.mark.parametrize("way", ["option", "variable", "folder"])
def test_a_home_whose_name_is_no_utf8_is_refused_with_advice(tmp_path: Path, way: str) -> None:
    name = str(tmp_path / "caf\udce9")
    here = Path(name)
    if way == "folder":
        here.mkdir()
        (here / "ksi.toml").touch()
    environ = {"KSI_HOME": name} if way == "variable" else {}
    with pytest.raises(ConfigError, match=r"is not UTF-8.*rename it, or choose another home") as caught:
        find_home(name if way == "option" else None, environ, here)
    caught.value.message.encode()


def test_a_variable_that_is_no_utf8_is_refused_by_its_name(tmp_path: Path) -> None:
    error = refused(environ={"KSI_LOG__DIR": "caf\udce9"}, home=tmp_path)
    assert error.message == "variable 'KSI_LOG__DIR': its text is not UTF-8; set it again"


def test_paths_begin_at_the_home_unless_they_are_absolute() -> None:
    config = load(NOWHERE, {})
    assert config.socket_path == NOWHERE / "var/run/daemon.sock"
    assert config.pid_path == NOWHERE / "var/run/daemon.pid"
    assert config.log_dir == NOWHERE / "var/logs"
    assert config.path("/tmp/x") == Path("/tmp/x")


# -- the shipped file -------------------------------------------------------------------------------------------------


def test_the_configuration_cannot_be_changed() -> None:
    config = load(NOWHERE, {})
    thing: Any = config.queue
    with pytest.raises(AttributeError):
        thing.lease = 1.0


def test_every_section_is_read() -> None:
    assert set(module._SECTIONS) == set(SECTIONS)
