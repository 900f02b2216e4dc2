"""config: files, bases, overrides, runs of earlier versions, and what is refused with which words."""

import dataclasses
import functools
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from polarmask_tf import config as configs
from polarmask_tf.config import Config, load
from polarmask_tf.config import yaml as config_yaml
from polarmask_tf.config.yaml import _all_keys as all_keys
from polarmask_tf.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((CHECKOUT / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refusal(*args, **options):
    """The message with which load refuses; one line."""
    with pytest.raises(InputError) as error:
        load(*args, **options)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---- shipped files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_file_loads_by_path_and_by_name(path):
    config = load(path)
    assert load(path.stem) == load(path.name) == load(f"configs/{path.name}") == config
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 20  # says what it is for


def test_there_are_shipped_files():
    assert SHIPPED


def test_configs_are_found_in_an_installed_package_and_beside_a_checkout(tmp_path, monkeypatch):
    assert configs.configs_dir() == CHECKOUT / "configs"
    package = tmp_path / "site-packages" / "polarmask_tf"
    package.mkdir(parents=True)
    monkeypatch.setattr(config_yaml, "__file__", str(package / "config" / "yaml.py"))
    (tmp_path / "site-packages" / "configs").mkdir()
    assert configs.configs_dir() == tmp_path / "site-packages" / "configs"
    (package / "configs").mkdir()  # what the wheel installs comes first
    (package / "configs" / "own.yaml").write_text("train: {steps: 7}")
    assert configs.configs_dir() == package / "configs"
    assert load("own").train.steps == 7


def test_no_two_shipped_files_are_the_same_settings():
    found = {}
    for path in SHIPPED:
        assert found.setdefault(configs.dump(load(path)), path) == path


@pytest.mark.parametrize("name", config_yaml.SAME_SETTINGS)
def test_a_row_that_equals_another_is_found_by_its_own_name(name, write):
    path = configs.find(name)
    assert path.stem != name and path in SHIPPED and configs.find(f"{name}.yaml") == configs.find(f"configs/{name}") == path
    assert load(name) == load(path) == load(write(f"base: {name}.yaml"))
    assert name in path.read_text() or name == "released"  # said where one reads it


def test_loading_a_config_imports_no_tensorflow():
    code = "import sys; from polarmask_tf import config; config.load('shapes'); sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


def test_an_unknown_file_names_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "shapes.yml", "sub/shapes.yaml", "", "/", "..", "a\0b"):
        assert "shapes" in refusal(name)


def test_a_file_in_the_working_directory_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.yaml").write_text("train: {steps: 3}")
    assert load("shapes.yaml").train.steps == 3


# ---- bases


def test_a_chain_of_bases_merges_section_by_section(write):
    write("model: {rays: 24, head: {channels: 32, convs: 3}}\ntrain: {steps: 10, seed: 4}", "a.yaml")
    write("base: a.yaml\nmodel: {head: {convs: 1}}\ntrain: {steps: 20}", "b.yaml")
    config = load(write("base: b.yaml\ntrain: {steps: 30}\ndata: {size: [64, 96]}"))
    assert (config.model.rays, config.model.head.channels, config.model.head.convs) == (24, 32, 1)
    assert (config.train.steps, config.train.seed, config.data.size) == (30, 4, (64, 96))
    assert config.model.fpn == Config().model.fpn  # what no file names keeps its default


@pytest.mark.parametrize(
    ("levels", "wanted"), [("[3]", r"\[3\] need none: --set 'targets.ranges=\[\]'"), ("[3,4,5]", r"\[3, 4, 5\] need 2 of them")]
)
def test_ranges_that_do_not_fit_the_levels(levels, wanted):
    with pytest.raises(InputError, match=rf"targets.ranges is \[64.0\]: model.fpn.levels {wanted}"):
        load("shapes", [f"model.fpn.levels={levels}", "targets.ranges=[64]"])


def test_of_width_and_widths_the_later_counts(write):
    write("model: {backbone: {widths: [4, 8, 8, 8]}}", "a.yaml")
    above = write("base: a.yaml\nmodel: {backbone: {width: 16}}")
    for config, widths in (
        (load(write("base: a.yaml\nmodel: {rays: 12}", "b.yaml")), (4, 8, 8, 8)),
        (load(above), (16, 32, 64, 128)),
        (load("shapes", ["model.backbone.width=8"]), (8, 16, 32, 64)),
        (load(above, ["model.backbone.widths=[5,6,7,8]"]), (5, 6, 7, 8)),
        (load(write("model: {backbone: {width: 16, widths: [4, 8, 8, 8]}}", "both.yaml")), (4, 8, 8, 8)),
    ):
        assert config.model.backbone.stage_widths() == widths


def test_a_base_is_looked_up_beside_the_file_that_names_it(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("train: {steps: 5}", "root.yaml")
    write("base: ../root.yaml", "sub/middle.yaml")
    assert load(write("base: sub/middle.yaml")).train.steps == 5


def test_of_a_list_of_bases_the_later_wins_and_the_file_over_all(write):
    write("train: {steps: 1, seed: 1, patience: 0}\ndata: {batch: 2}", "a.yaml")
    write("base: a.yaml\ntrain: {steps: 2, seed: 2}", "b.yaml")
    write("train: {steps: 3}", "c.yaml")
    config = load(write("base: [b.yaml, c.yaml]\ntrain: {learning_rate: 0.5}"))
    assert (config.train.steps, config.train.seed, config.data.batch, config.train.learning_rate) == (3, 2, 2, 0.5)
    assert load(write("base: [c.yaml, b.yaml]")).train.steps == 2
    assert load(write("base: []")) == load(write("base:")) == Config()


def test_a_base_may_be_a_shipped_file(write):
    assert load(write("base: [paper_1x.yaml, schedule_2x, resnet101.yaml]")).train.steps == load("paper_2x").train.steps
    write("train: {steps: 5}", "small.yaml")  # the one beside comes first
    assert load(write("base: small.yaml")).train.steps == 5


def test_bases_without_end_are_refused(write):
    for number in range(30):  # two to the thirtieth
        write(f"base: [{number + 1}.yaml, {number + 1}.yaml]", f"{number}.yaml")
    write("", "30.yaml")
    assert "more than 100 files" in refusal(write("base: 0.yaml"))
    for number in range(400):  # deeper than Python calls
        write(f"base: {number + 1}.yaml", f"{number}.yaml")
    assert "more than 100 files" in refusal(write("base: 0.yaml"))


@pytest.mark.parametrize("base", ["a" * 5000, "{a: b}", "3", "/dev/zero", ".", "'a\\0b'", "[[]]"])
def test_a_base_that_is_no_file_is_refused(write, base):
    message = refusal(write(f"base: {base}"))
    assert "mine.yaml: base" in message and len(message) < 500


@pytest.mark.parametrize("names", [("mine",), ("mine", "b"), ("mine", "b", "c")])
def test_a_cycle_of_bases_is_refused(write, names):
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        write(f"base: {base}.yaml", f"{name}.yaml")
    assert "base" in refusal(write(f"base: {names[1 % len(names)]}.yaml"))


def test_a_missing_base_is_named(write):
    message = refusal(write("base: nowhere.yaml"))
    assert "nowhere.yaml" in message and "mine.yaml" in message


def test_an_empty_file_is_the_default(write):
    assert load(write("")) == load(write("# nothing\n")) == Config()


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("trian: {steps: 3}", "train"),
        ("train: {step: 3}", "train.steps"),
        ("train: {learningrate: 3}", "train.learning_rate"),
        ("steps: 3", "train.steps"),  # right name, wrong place
        ("model: {fpn: {level: [3]}}", "model.fpn.levels"),
        ("train: {nms_iou: 0.3}", "postprocess.nms_iou_threshold"),
    ],
)
def test_an_unknown_key_names_the_nearest(write, text, wanted):
    message = refusal(write(text))
    assert f"did you mean {wanted}?" in message and "mine.yaml" in message


def test_an_unknown_key_like_no_other_is_still_named(write):
    assert "zzzzzz" in refusal(write("zzzzzz: 1"))
    assert "train.7" in refusal(write("train: {7: 1}"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", "whole number"),
        ("train.steps=1.5", "whole number"),
        ("train.steps=true", "whole number"),
        ("train.steps=", "whole number"),
        ("train.steps={a: 1}", "whole number"),
        ("train.learning_rate=fast", "number"),
        ("train.learning_rate=true", "number"),
        ("train.learning_rate=[1]", "number"),
        ("postprocess.multi_label=1", "true or false"),
        ("data.flip=1", "none, horizontal, both"),
        ("data.train=5", "text"),
        ("data.size=64", "a list"),
        ("data.size=[64]", "2 values"),
        ("data.size=[64, x]", "whole number"),
        ("model.fpn.levels='3, 4'", "a list"),
        ("model.head.norm=layer", "group, batch, none"),
        ("train.optimizer=[adamw]", "adamw, muon, sgd"),
        ("train=5", "section"),
        ("model.head=[]", "section"),
        ("train.steps.x=3", "whole number"),
    ],
)
def test_ill_typed_values_are_refused_with_what_is_wanted(override, words):
    message = refusal("shapes", [override])
    assert words in message and override.split("=")[0].removesuffix(".x") in message


def test_sizes_of_short_side_need_no_multiples_but_an_order():
    assert load("shapes", ["data.fit=short_side", "data.size=[100, 167]"]).data.size == (100, 167)
    assert "the shorter side" in refusal("shapes", ["data.fit=short_side", "data.size=[167, 100]"])
    assert "data.crop" in refusal("shapes", ["data.fit=short_side", "data.size=[96, 128]", "data.crop=[64, 64]"])


@pytest.mark.parametrize("override", ["train.steps", "=3", "", "train.steps: 3", "train.steps=[1", "train.steps=@"])
def test_malformed_overrides_are_refused(override):
    assert "override" in refusal("shapes", [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.rays=3", "model.rays"),
        ("model.backbone.groups=8", "block: bottleneck"),
        ("model.backbone.stem_width=8", "stem: 3x3"),
        ("model.backbone.widths=[16, 32, 64]", "model.backbone.widths"),
        ("model.backbone.widths=[16, 32, 64, 0]", "model.backbone.widths"),
        ("model.backbone.multiplier=0.5", "model.backbone.width"),
        ("model.backbone.freeze_at=6", "0 to 5"),
        ("conventions=released", "model.head.box: true"),
        ("train.decay=l2", "optimizer: sgd"),
        ("train.bias_lr_multiplier=2", "train.decay: l2"),
        ("model.fpn.levels=[]", "model.fpn.levels"),
        ("model.fpn.levels=[3, 5]", "model.fpn.levels"),
        ("model.fpn.levels=[4, 3]", "model.fpn.levels"),
        ("model.fpn.levels=[1, 2, 3]", "model.fpn.levels"),
        ("model.fpn.levels=[6, 7]", "model.fpn.levels"),
        ("model.backbone.blocks=[1, 1, 1]", "model.backbone.blocks"),
        ("model.backbone.blocks=[1, 1, 0, 1]", "model.backbone.blocks"),
        ("model.mean=[1, 2]", "model.mean"),
        ("model.std=[1, 0, 1]", "model.std"),
        ("data.size=[100, 128]", "multiples of 32"),
        ("data.sizes=[[64, 64], [64, 65]]", "data.sizes"),
        ("data.sizes=[[64, 0]]", "data.sizes"),
        ("data.crop=[64]", "data.crop"),
        ("data.crop=[64, 65]", "data.crop"),
        ("train.accumulate=3", "train.accumulate"),
        ("train.ema=1", "train.ema"),
        ("train.evaluate_every=10", "data.val"),
        ("train.patience=2", "train.evaluate_every"),
        ("data.size=[0, 128]", "data.size"),
        ("data.batch=0", "data.batch"),
        ("data.scale=[2, 1]", "data.scale"),
        ("data.scale=[0, 1]", "data.scale"),
        ("targets.radius=0", "targets.radius"),
        ("targets.ranges=[64]", "targets.ranges"),
        ("targets.ranges=[128, 64]", "targets.ranges"),
        ("train.steps=0", "train.steps"),
        ("train.checkpoint_every=0", "train.checkpoint_every"),
        ("postprocess.score_threshold=1", "postprocess.score_threshold"),
        ("postprocess.score_threshold=-0.1", "postprocess.score_threshold"),
        ("postprocess.max_detections=0", "postprocess.max_detections"),
    ],
)
def test_contradictions_are_refused(write, override, words):
    base = write("model: {fpn: {levels: [3, 4, 5]}}")
    assert words in refusal(base, [override])


@pytest.mark.parametrize(
    "override",
    [
        "targets.radius=.inf",
        "targets.radius=.nan",
        "train.learning_rate=.nan",
        "train.learning_rate=1e999",
        "targets.ranges=[.nan, .nan]",
        "model.mean=[.inf, 0, 0]",
        "loss.focal_gamma=-.inf",
        f"train.learning_rate={10**400}",
    ],
)
def test_numbers_must_be_finite(override):
    """Infinity and NaN would come back as a traceback, or as a loss of NaN."""
    assert override.split("=")[0] in refusal("shapes", [override])


@pytest.mark.parametrize(
    "override",
    [
        "model.backbone.width=0",
        "model.fpn.channels=0",
        "model.head.channels=-8",
        "model.head.convs=-1",
        "data.max_instances=0",
        "data.shuffle=0",
        "postprocess.pre_nms_top_k=0",
        "postprocess.nms_iou_threshold=-1",
        "postprocess.nms_iou_threshold=2",
        "train.learning_rate=-1",
        "train.warmup_steps=-5",
        "train.seed=-1",
        "train.momentum=1.5",
        "loss.ray_weight=-1",
        "model.backbone.groups=0",
        "train.accumulate=0",
        "train.backbone_lr_multiplier=-0.1",
        "train.freeze_backbone_steps=-1",
        "data.color_jitter=1.1",
    ],
)
def test_numbers_that_no_training_could_start_with_are_refused(override):
    assert override.split("=")[0] in refusal("shapes", [override])


def fields(section, prefix=""):
    """(key, type, field) of every setting."""
    for entry in dataclasses.fields(section):
        hint = typing.get_type_hints(section)[entry.name]
        yield from (
            fields(hint, f"{prefix}{entry.name}.") if dataclasses.is_dataclass(hint) else [(prefix + entry.name, hint, entry)]
        )


WHOLE = [key for key, hint, _ in fields(Config) if hint is int]
LISTS = [
    key for key, hint, _ in fields(Config) if typing.get_origin(hint) is tuple and "mean" not in key and "ranges" not in key
]


def test_there_are_numbers_to_check():
    assert len(WHOLE) > 20 and len(LISTS) > 5


@pytest.mark.parametrize("key", WHOLE)
def test_every_whole_number_has_bounds(key):
    """postprocess.max_detections: 10**9 would ask for memory without end, hours after it was written."""
    for value in (-(10**9) - 1, 10**10):
        message = refusal("shapes", [f"{key}={value}"])
        assert message.startswith(f"{key} is {value}: ") and len(message) < 200
    assert refusal("shapes", [f"{key}={10**25}"])


@pytest.mark.parametrize("key", LISTS)
def test_every_list_of_whole_numbers_has_bounds(key):
    value = functools.reduce(getattr, key.split("."), Config())
    text = "[[10000000000, 32]]" if key == "data.sizes" else str([10**10] * max(len(value), 2))
    message = refusal("shapes", [f"{key}={text}"])
    assert message.startswith(f"{key} is [") and len(message) < 200


def test_widths_and_depths_together_have_a_bound():
    assert refusal("shapes", ["model.backbone.blocks=[200,200,1,1]"]).endswith("at most 300 blocks together")
    for few in (["model.backbone.width=1024"], ["model.head.channels=4096", "model.head.convs=100"]):
        many = [*few, "model.backbone.blocks=[9,9,9,9]"]
        assert "2 billion" in refusal("shapes", many)
    # 8 times as many channels as ResNet-152 has
    load("shapes", ["model.backbone.block=bottleneck", "model.backbone.blocks=[3,8,36,3]", "model.backbone.width=200"])


def test_a_section_is_checked_alone():
    configs.check(configs.FPNConfig())
    with pytest.raises(InputError, match=r"^model.fpn.channels is 0: "):
        configs.check(configs.FPNConfig(channels=0), "model.fpn.")
    with pytest.raises(InputError, match=r"^model.backbone.stem_width needs"):
        configs.check(configs.BackboneConfig(stem_width=8))


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "3", "a: [", "\t- x", "a: b: c", "!!python/object:os.system {}"])
def test_bad_yaml_names_the_file(write, text):
    assert "mine.yaml" in refusal(write(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 3}\ntrain: {seed: 4}", "line 2: the key train stands twice"),
        ("train:\n  steps: 3\n  seed: 0\n  steps: 4", "line 4: the key steps stands twice"),
        ("train: {steps: 3, 'steps': 4}", "the key steps stands twice"),
        ("data: {sizes: [{a: 1, a: 2}]}", "the key a stands twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("train: &x {steps: 3}\ndata: {<<: *x}", "aliases"),
        ("train: &x\n  steps: *x", "aliases"),
        ("[" * 20_000, "nested too deeply"),
        ("train: " + "{a: " * 5_000, "nested too deeply"),
        ("#" + "x" * 200_000, "longer than"),
        ("train: {steps: " + "9" * 5000 + "}", "mine.yaml"),
        ("train: {steps: 0x" + "f" * 50_000 + "}", "64 bits"),
        ("train: {steps: 1" + ":59" * 20_000 + "}", "64 bits"),
        ("train: {learning_rate: 190" + ":20" * 2000 + ".15}", "mine.yaml"),
        ("train: {steps: !!timestamp x}", "mine.yaml"),
        ("train: {steps: !!bool x}", "mine.yaml"),
        ("train: {steps: !!float ''}", "mine.yaml"),
        ("train: {steps: !!int ''}", "mine.yaml"),
        ("train: !!map x", "mine.yaml"),
        ("train: !!map [a, b]", "mine.yaml"),
        ("train: {? [1, 2] : 3}", "mine.yaml"),
        ("train: {? {a: b} : 3}", "mine.yaml"),
        ("a: \x00", "mine.yaml"),
        ("a\x1b[31m: 1", "mine.yaml"),
        ('"a\\x1b[31m\\nb": 1', "unknown key a\\x1b[31m b"),
        ("? " + "k" * 90_000 + "\n: 1", "unknown key kkk"),
        ("train: {steps: [" + "[1], " * 10_000 + "]}", "whole number"),
        ("data: {train: [" + "'" + "x" * 50_000 + "']}", "text"),
    ],
    ids=lambda value: value[:20],
)
def test_what_yaml_allows_and_no_config_needs_is_refused_in_a_short_line(write, text, words):
    message = refusal(write(text))
    assert words in message and len(message) < 2200 and message.isprintable()


def test_an_override_is_held_to_the_same():
    for value in ("{steps: 3, steps: 4}", "[" * 5000, "0x" + "f" * 5000, "9" * 5000, "[&x 1, *x]", "x" * 200_000):
        message = refusal("shapes", [f"train.steps={value}"])
        assert message.startswith("override 'train.steps=") and len(message) < 400
    assert "a whole number" in refusal("shapes", ["train.steps" + ".a" * 5000 + "=1"])
    assert len(refusal("shapes", ["x" * 100_000 + "=1"])) < 400


def test_what_is_no_regular_file_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero"):
        assert refusal(path) == f"{path}: not a regular file, but a pipe or a device"
    for path in (tmp_path, "a" * 5000, f"{tmp_path}/{'b' * 300}.yaml"):
        assert "no config file" in refusal(path)
    os.mkfifo(tmp_path / "pipe2.yaml")
    (tmp_path / "mine.yaml").write_text("base: pipe2.yaml")
    assert "pipe2.yaml" in refusal(tmp_path / "mine.yaml")


def test_what_is_no_text_names_the_file(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "binary.yaml" in refusal(tmp_path / "binary.yaml")


@pytest.mark.parametrize("value", ["2021-13-01", "0x_", "0b_", "2021-02-30 10:00:00"])
def test_values_that_make_yaml_itself_stumble(write, value):
    """PyYAML raises a bare ValueError for what looks like a date or number and is none."""
    assert refusal("shapes", [f"train.steps={value}"])
    assert "mine.yaml" in refusal(write(f"train: {{steps: {value}}}"))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2000) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ALL_KEYS = sorted(all_keys(Config))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ALL_KEYS), json_like)
def test_any_value_for_any_key_is_taken_or_refused(key, value):
    try:
        config = load("shapes", [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"])
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, Config)


# ---- overrides, and back to text


def test_overrides_apply_in_order_and_over_the_file(write):
    path = write("train: {steps: 5, learning_rate: 1e-3}\nmodel: {head: {norm: none}}")
    config = load(path, ["train.steps=6", "train.steps=7", "data.size=[64, 64]", "train={seed: 3}", "targets.ranges=[10, 20]"])
    assert (config.train.steps, config.train.seed, config.train.learning_rate) == (7, 3, 0.001)
    assert config.model.head.norm == "none" and config.data.size == (64, 64) and config.targets.ranges == (10.0, 20.0)
    assert isinstance(config.targets.ranges[0], float)
    assert load(path, ["data.train=a=b"]).data.train == "a=b"


def test_nothing_is_the_empty_text(write):
    config = load(
        write("data: {val: x, train:}\nmodel: {backbone: {weights: imagenet}}"), ["data.val=", "model.backbone.weights=~"]
    )
    assert config.data.train == config.data.val == config.model.backbone.weights == ""
    assert "a whole number" in refusal("shapes", ["train.steps="]) and "section" in refusal(write("train:"))


# ---- keys of earlier versions


@pytest.mark.parametrize(("old", "new"), config_yaml.RENAMED.items())
def test_an_old_key_is_refused_with_the_new_one_named_and_read_in_a_run(write, old, new):
    section, key = old.split(".")
    expected = new or "polarmask convert --decoded"
    value = {"lr_boundaries": "[5, 7]", "": "''"}.get(
        new.rpartition(".")[2], "0.25" if "iou" in new or "fraction" in new else "2"
    )
    for message in (refusal(write(f"{section}: {{{key}: {value}}}")), refusal("shapes", [f"{old}={value}"])):
        assert old in message and expected in message
    values = yaml.safe_load(configs.dump(load("paper_1x")))  # where each of them goes with the rest
    if new:
        del values[section][new.split(".")[1]]
    values[section][key] = yaml.safe_load(value)
    saved = configs.load_saved(write(yaml.safe_dump(values), "config.yaml"))
    if new:
        found = functools.reduce(getattr, new.split("."), saved)
        assert (list(found) if isinstance(found, tuple) else found) == yaml.safe_load(value)
        assert configs.dump(saved) == configs.dump(load("paper_1x", [f"{new}={value}"]))
    else:
        assert saved == load("paper_1x")


def test_a_run_made_before_the_keys_were_renamed_is_read():
    config = configs.load_saved(CHECKOUT / "tests/old_run/config.yaml")
    assert (config.postprocess.pre_nms_top_k, config.postprocess.nms_iou_threshold) == (1000, 0.5)
    assert (config.train.final_lr_fraction, config.train.lr_boundaries, config.train.bias_lr_multiplier) == (0.02, (), 1.0)
    assert config.train.learning_rate == 0.05 and config.model.rays == 12


def test_a_saved_config_is_checked_like_any_other(write):
    values = yaml.safe_load(configs.dump(load("shapes")))
    for section, key, value in (("train", "stps", 3), ("postprocess", "nms_iou", 7.0), ("train", "steps", "x")):
        changed = {**values, section: {**values[section], key: value}}
        changed["postprocess"].pop("nms_iou_threshold", None) if key == "nms_iou" else None
        with pytest.raises(InputError):
            configs.load_saved(write(yaml.safe_dump(changed)))


positive = st.floats(0.01, 100)
FIELDS = {
    "model.rays": st.integers(4, 100),
    "model.backbone.block": st.sampled_from(["basic", "bottleneck"]),
    "model.backbone.blocks": st.lists(st.integers(1, 9), min_size=4, max_size=4),
    "model.fpn.levels": st.integers(2, 5).flatmap(lambda low: st.integers(low + 1, 8).map(lambda end: list(range(low, end)))),
    "model.head.ray_bias": st.floats(-20, 20),
    "model.mean": st.lists(st.floats(0, 255), min_size=3, max_size=3),
    "data.train": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    "data.size": st.lists(st.integers(1, 40).map(lambda n: 32 * n), min_size=2, max_size=2),
    "data.flip": st.sampled_from(["none", "horizontal", "both"]),
    "data.crop": st.sampled_from([[], [32, 64]]),
    "postprocess.multi_label": st.booleans(),
    "data.scale": st.lists(positive, min_size=2, max_size=2).map(sorted),
    "targets.radius": positive,
    "targets.center": st.sampled_from(["mass", "box"]),
    "postprocess.score_threshold": st.floats(0, 0.99),
    "train.lr_boundaries": st.lists(st.integers(0, 10**6), max_size=3),
    "train.learning_rate": positive,
}


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_dump_and_load_are_inverse(tmp_path_factory, values):
    flow = {"default_flow_style": True, "width": 10**6}
    folder = tmp_path_factory.mktemp("round")
    (folder / "defaults.yaml").write_text("")
    overrides = [f"{key}={yaml.safe_dump(value, **flow)}" for key, value in values.items()]
    config = load(folder / "defaults.yaml", overrides)
    for key, value in values.items():
        found = functools.reduce(getattr, key.split("."), config)
        assert found == (tuple(value) if isinstance(value, list) else value)
    path = folder / "trip.yaml"
    path.write_text(configs.dump(config), encoding="utf-8")
    assert load(path) == config


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("shapes").train.steps = 3
