"""Any value of any setting, and any file, gives settings or an error of one line."""

import os
import random
import string
from pathlib import Path

import pytest
import yaml
from support.processes import REPOSITORY

from trainer.config.load import find_config_file, load_config, to_yaml
from trainer.config.schema import RunConfig, settings_by_name
from trainer.config.texts import OWN_NAMES
from trainer.errors import ConfigError

VALUES = [
    "", "null", "~", "-1", "0", "1", "-0.0", "1e9", "1e308", "1e999", "-1e999", ".nan", ".inf", "inf", "nan", "0x10",
    "010",
    "1_000", "12:30:00", "2024-01-01", "on", "no", "true", "9" * 25, "9" * 5000, "a" * 300, "a" * 5000, "ä" * 200,
    "[", "{",
    "[]", "{}", "[1]", "[a, b]", "[[1]]", "[null]", "[{a: 1}]", "[" * 1500, "[" * 1500 + "]" * 1500, "{a: " * 1500,
    "*a",
    "&a [*a]", "!!python/object:os.system x", "!!int 3", "!x", "<<: 1", "%", "@", "`", "'", '"', "a: b", "- a",
    "# a", "|",
    ">", "?", "..", "../..", "/", "/dev/zero", "~nosuch/x", "~", "a/b/c", "a//b", ".", ".x", "x/.y", " ", "x ",
    "checkpoints",
    "x/logs/y", "d3/checkpoints/step-00000030", "TensorBoard", "a\0b", "a\x1b[31mb", "a\nb", "a\rb", "\x85", "\u2028",
    "\u202ea", "\u200b", "\ud800", "\udcff", "${", "${}", "${oc.env:HOME}", "${run.name}", "${unknown}", "\\",
    "\\${a}", "=",
    "a=b", "fc=0.1", "[fc=.inf]", "[fc=1e999]", "steps 1-999999999", "1-" + "9" * 5000, "9" * 5000 + "m", "٣",
    "\uff11", "²",
]  # fmt: skip


def error_of(files: list[Path], overrides: list[str]) -> str:
    """Returns the error, or "" if there are settings, after checking that they can be written and read."""
    try:
        config = load_config(files, overrides)
    except ConfigError as error:
        text = str(error)
        assert text.isprintable() and 0 < len(text) <= 2000, text
        return text
    to_yaml(config).encode()
    os.fsencode(config.folder)
    return ""


def random_value(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return draw.choice(VALUES)
    alphabet = draw.choice(
        [string.printable, "0123456789.-+e_:", "[]{}&*!|>'\",: #ab\n\t", "".join(map(chr, range(0x500)))]
    )
    return "".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 12)))


def test_thousand_hostile_values_on_the_command_line_are_settings_or_one_line() -> None:
    draw, names = random.Random(0), list(settings_by_name())
    errors = [error_of([], [f"{draw.choice(names)}={random_value(draw)}"]) for _ in range(1000)]
    assert 300 < sum(map(bool, errors)) < 950


def test_two_hundred_hostile_files_are_settings_or_one_line(tmp_path: Path) -> None:
    draw, names, file = random.Random(1), list(settings_by_name()), tmp_path / "x.yaml"
    errors = []
    for _ in range(200):
        section, _, key = draw.choice(names).partition(".")
        value = random_value(draw)
        text = draw.choice(
            [
                f"{section}:\n  {key}: {value}\n",
                f"{section}: {value}\n",
                f"{value}: {{{key}: 1}}\n",
                f"{value}\n",
                f"- {value}",
            ]
        )
        file.write_bytes(text.encode("utf-8", "surrogateescape" if "\ud800" not in text else "replace"))
        errors.append(error_of([file], []))
    assert 80 < sum(map(bool, errors)) < 200


@pytest.mark.parametrize(
    "setting",
    [
        "data.image_size=99999999", "data.workers=1000000", "data.crop_padding=99999999", "data.cutout_size=99999999",
        "data.global_batch_size=999999999999", "data.mixup_alpha=1e300", "data.cutmix_alpha=1e300", "model.depth=99999",
        "model.widths=[99999999]", "model.widths=[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "train.epochs=1e30",
        "train.epochs=99999999999", "train.max_steps=99999999999999", "train.virtual_ranks=99999999",
        "train.threads_per_rank=1000000", "train.threads_per_rank=-1", "train.max_bad_steps=99999999999999999999",
        "train.hang_timeout_seconds=1e-9", "train.hang_timeout_seconds=1e300", "train.hang_timeout_seconds=.inf",
        "train.profile=1-999999999", f"train.time_limit={'9' * 5000}", "eval.batch_size=99999999999",
        "eval.every_epochs=99999999999999", "checkpoint.keep=99999999999", "checkpoint.every_steps=99999999999999",
        "log.every_steps=99999999999999999999", "run.seed=99999999999", f"train.epochs={'9' * 5000}",
        f"log.notes={'x' * 5000}", f"log.tags=[{','.join('x' * 2000)}]",
    ],
)  # fmt: skip
def test_value_that_would_take_all_memory_or_never_end_is_refused(setting: str) -> None:
    text = error_of([], [setting])
    assert text.startswith(setting.partition("=")[0]) or setting.partition("=")[0] in text
    assert len(text) < 400


def test_every_number_has_both_bounds() -> None:
    free = {
        "optim.lr", "optim.lr_vectors", "optim.lr_head", "optim.weight_decay", "train.clip_grad_norm", "optim.betas",
        "data.progressive_sizes", "model.widths",  # checked in validate.py
        "train.threads_per_rank", "data.channels",
    }  # fmt: skip
    for name, info in settings_by_name().items():
        limits = info.field.metadata
        if ("int" in str(info.annotation) or "float" in str(info.annotation)) and name not in free:
            assert limits["maximum"] is not None, name
            assert limits["minimum"] is not None or limits["above"] is not None, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 256, "at most 255 bytes in each part"), ("ä" * 128, "at most 255 bytes in each part"),
        ("/".join(["x" * 250] * 5), "at most 1,000 bytes in all"), ("a\0b", "without control characters"),
        ("a\x1b[2Jb", "without control characters"), ("a\nb", "without control characters"),
        ("\udcff", "UTF-8"), (".hidden", "without a dot at the start"), ("a/.b", "without a dot at the start"),
        (" ", "spaces at the ends"), ("a /b", "spaces at the ends"), ("..", "folder under run.root"),
        *((own, "a file or folder of a run itself") for own in sorted(OWN_NAMES)),
        ("x/logs/y", "'logs' is the name"), ("d3/checkpoints/step-00000030", "'checkpoints' is"), ("a/Wandb",
        "'Wandb' is"),
    ],
)  # fmt: skip
def test_run_name_that_collides_or_cannot_be_a_folder_is_refused(name: str, message: str) -> None:
    text = error_of([], [f"run.name={name}"])
    assert text.startswith("run.name=") and message in text and len(text) < 300


@pytest.mark.parametrize(
    "name", ["a", "sweep/lr-0.1", "[cat]", "ünï", "猫", "a b", "x" * 255, "logs2", "-1", "a..b", "~a"]
)
def test_other_run_names_are_accepted(name: str) -> None:
    assert load_config([], [f"run.name={name}"]).run.name == name


def test_own_names_are_those_that_the_documentation_lists() -> None:
    rows = (REPOSITORY / "docs" / "run_folder.md").read_text().partition("| path |")[2].partition("\n\n")[0]
    listed = {word.split("/")[0] for cell in rows.splitlines()[2:] for word in cell.split("|")[1].split("`")[1::2]}
    assert listed and listed <= OWN_NAMES


TEXTS = [
    "12:30:00",
    "on",
    "off",
    "no",
    "1e3",
    "0x10",
    "010",
    "1_000",
    "null",
    "2024-01-01",
    "~",
    "true",
    ".inf",
    "1.0",
    "+1",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_setting_in_a_file_stays_as_typed(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"log: {{project: {text}, tags: [{text}]}}\nmodel:\n  freeze:\n  - {text}\n")
    config = load_config([file], [])
    assert (config.log.project, config.log.tags, config.model.freeze) == (text, [text], [text])
    assert load_config([], [f"log.project={text}", f"log.tags=[{text}]"]).log == config.log


def test_null_is_no_text_only_where_a_setting_may_be_null(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("log: {notes: null, group: , project: null}\ntrain: {max_steps: ~}\ndata: {cache_dir: 'null'}")
    config = load_config([file], [])
    assert (config.log.notes, config.log.group, config.train.max_steps) == (None, None, None)
    assert (config.log.project, config.data.cache_dir) == ("null", "null")


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("1_000", 1000), ("'3'", 3), ("+7", 7)])
def test_whole_number_is_decimal(tmp_path: Path, text: str, value: int) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"train: {{epochs: {text}}}\ndata: {{progressive_sizes: [8, 016]}}")
    config = load_config([file], [])
    assert config.train.epochs == value and config.data.progressive_sizes == [8, 16]


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "train:\n", "train:\n  # epochs: 3\noptim: {lr: 0.1}\n", "train: {}"]
)
def test_empty_file_or_section_is_accepted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cifar10.yaml"
    file.write_text(text)
    assert load_config([file], []) == RunConfig(run=load_config([], []).run)


def test_alias_and_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes("log: {project: &p ab, tags: [*p], notes: *p}\n".encode("utf-8-sig"))
    assert load_config([file], []).log.notes == "ab"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train:\n\tepochs: 3", "not readable as YAML"), (b"train: {epochs: 3, epochs: 4}", "duplicate key epochs"),
        (b"train: {epochs: 3}\ntrain: {epochs: 4}", "duplicate key train"), (b"1: {a: 2}", "no section '1'"),
        (b"null: {a: 2}", "no section 'null'"), (b"? [a]\n: 3", "has a key that is not text"),
        (b"[" * 1500, "more than 8 levels"), (b"a: " + b"[" * 90_000, "more than 8 levels"),
        (b"{a: " * 1500, "more than 8 levels"), (BOMB.encode(), "no section 'a'"),
        (b"log: {tags: &t [*t]}", "expected a list"), (b"log: {tags: [[a]]}", "expected a list"),
        (b"log: {notes: {a: 1}}", "expected text"), (b"train: {<<: {epochs: 3}}", "no setting 'train.<<'"),
        (b"run: {name: !!python/object/apply:os.getcwd []}", "tags such as"), (b"a: !!binary x", "tags such as"),
        (b"--- {}\n--- {}", "not readable as YAML"), ("train: {}".encode("utf-16"), "not UTF-8"),
        (b"\x7fELF\x01\x00\x00\x80", "cannot be read"), (b"a\0b: 3", "not readable as YAML"), (b"\xff", "not UTF-8"),
        (b"#" * 200_000, "larger than 100,000 bytes"), (b"train: {epochs: " + b"9" * 5000 + b"}",
        "expected a whole number"),
        (b"run: {root: '${data.root}'}\ndata: {root: '${run.root}'}", "Recursive interpolation"),
        (b"run: {name: '" + b"${a:" * 300 + b"}" * 300 + b"'}", "contains too many others"),
        (b"run: {name: '${oc.env:NO_SUCH_VARIABLE}'}", "there is no environment variable NO_SUCH_VARIABLE"),
        (b"run: {name: '${'}", "run.name"), (b'log: {project: "a\\u001bb"}', "without control characters"),
        (b'log: {project: "\\ud800"}', "UTF-8"), (b"train: 3", "is a section"), (b"train: [epochs]", "is a section"),
    ],
)  # fmt: skip
def test_hostile_file_is_refused_with_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    text = error_of([file], [])
    assert message in text and len(text) < 500


def test_config_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name, message in (
        ("fifo", "not a regular"),
        ("folder", "is a folder"),
        ("zero", "not a regular"),
        ("loop", "no such"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config([find_config_file(str(tmp_path / f"{name}.yaml"))], [])


@pytest.mark.parametrize(
    "name", ["x" * 5000, f"{'x' * 5000}.yaml", "a/" * 3000, "a\0b", "~nosuch/x.yaml", "", "\x1b.yaml", "../"]
)
def test_odd_name_of_a_config_is_refused_with_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([find_config_file(name)], [])
    assert len(str(caught.value)) < 400


def test_file_name_of_a_shipped_config_suggests_its_name() -> None:
    with pytest.raises(ConfigError, match="no such file; did you mean --config digits"):
        find_config_file("digits.yaml")


@pytest.mark.parametrize("setting", ["run.root", "run.resume", "data.root", "data.cache_dir", "model.pretrained"])
def test_home_of_an_unknown_user_is_refused(setting: str) -> None:
    model = ["model.name=vgg16"] if setting == "model.pretrained" else []
    assert "home folder of that user is unknown" in error_of([], [f"{setting}=~nosuch/x", *model])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet50", "torchvision/resnet50"), ("ResNet-50", "torchvision/resnet50"), ("vgg19bn",
        "torchvision/vgg19_bn"),
        ("vit_b_16", "torchvision/vit_b_16"), ("resnet-18", "torchvision/resnet18"), ("lenett", "lenet"),
    ],
)  # fmt: skip
def test_name_of_a_torchvision_network_is_suggested(name: str, hint: str) -> None:
    assert f"did you mean '{hint}'?" in error_of([], [f"model.name={name}"])


def test_gpu_as_device_suggests_cuda() -> None:
    assert "did you mean 'cuda'?" in error_of([], ["train.device=gpu"])


SECRETS = [
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "DB_PASSWORD",
    "MY_PASSPHRASE",
    "AZURE_CREDENTIALS",
    "DB_PASS",
    "X_JWT",
]


@pytest.mark.parametrize("variable", SECRETS)
@pytest.mark.parametrize("text", ["${{oc.env:{}}}", "a-${{oc.env:'{}',none}}", "${{oc.env:${{log.group}}}}"])
def test_secret_variable_is_not_inserted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, "s3cret-value-of-this-variable")
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({"log": {"notes": text.format(variable), "group": variable}}))
    message = error_of([file], [])
    assert message.startswith(f"${{oc.env:{variable}}} looks like a secret") and "s3cret" not in message


def test_content_of_a_secret_variable_is_refused_in_any_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value-of-this-variable")
    monkeypatch.setenv("PROXY", "http://me:hunter2@proxy.example:3128")
    for setting in ("log.notes=my s3cret-value-of-this-variable", "log.tags=[a,s3cret-value-of-this-variable]"):
        message = error_of([], [setting])
        assert "content of the environment variable WANDB_API_KEY" in message and "s3cret" not in message
    assert "PROXY" in error_of([], ["log.notes=http://me:hunter2@proxy.example:3128"])


def test_harmless_variables_are_inserted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS_FOLDER", "/data/images-of-the-lab")
    monkeypatch.setenv("NUM_EPOCHS", "7")
    file = tmp_path / "x.yaml"
    file.write_text(
        "train: {epochs: '${oc.env:NUM_EPOCHS}'}\nlog: {notes: '${oc.env:NO_SUCH,none}', group: '${run.root}'}"
    )
    config = load_config([file], ["data.root=/data/images-of-the-lab"])
    assert (config.train.epochs, config.log.notes, config.log.group) == (7, "none", "runs")
