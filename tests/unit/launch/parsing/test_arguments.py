import pytest

from bitfleet.configs import available, load_config
from bitfleet.launch.job import command_line
from bitfleet.launch.parsing.arguments import option_names, parse_train
from bitfleet.optim import Schedule


def test_overrides_reach_nested_fields() -> None:
    config = parse_train(
        (
            "--config fashion_quickstart --optim.gamma.start 1e-5 --data.crop_padding=2 --model.depths 1 2 --run_dir /x"
        ).split(),
        "t",
    )
    assert config.optim.gamma.start == 1e-5
    assert config.optim.gamma.end == load_config("fashion_quickstart").optim.gamma.end
    assert config.data.crop_padding == 2
    assert config.model.depths == (1, 2)
    assert str(config.run_dir) == "/x"


def test_another_rule_brings_its_own_hyperparameters() -> None:
    arguments = "--config fashion_quickstart --optim.rule latent_sgd --optim.latent_lr.start 0.2 --optim.momentum 0.5"
    optim = parse_train(arguments.split(), "t").optim
    before = load_config("fashion_quickstart").optim
    assert (optim.rule, optim.latent_lr, optim.momentum) == ("latent_sgd", Schedule(start=0.2), 0.5)
    assert (optim.gamma, optim.sigma, optim.threshold, optim.lr) == (None, None, None, before.lr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--optim.rule bop --optim.sigma.start 0.1",
            "optim.sigma belongs to bop2ndorder; the rule bop has gamma, threshold",
        ),
        ("--optim.latent_lr.start=0.1", "optim.latent_lr belongs to .*latent_adam.*; the rule bop2ndorder has gamma"),
        ("--optim.momentum 0.1", "optim.momentum belongs to latent_sgd"),
        ("--optim.rule bob", "optim.rule must be one of .*bop2ndorder, .*, not 'bob'"),
        (
            "--optim.rule diode --engine.sharding zero1",
            'optim.rule diode needs engine.sharding "bits" or "none", not \'zero1\'',
        ),
    ],
)
def test_what_does_not_belong_to_a_rule_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_train(["--config", "fashion_quickstart", *arguments.split()], "t")


def test_launcher_arguments_are_ignored() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["launch/train.py", "--local_rank=1", "--config=fashion_quickstart"])
        assert parse_train(command_line(), "t") == load_config("fashion_quickstart")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "which run.*fashion_quickstart"),
        ("--confg x", "there is no option --confg; which run.*fashion_quickstart"),
        ("--config", "--config"),
        ("--config fashion_quikstart", "no configuration 'fashion_quikstart'; did you mean 'fashion_quickstart'"),
        (
            "--config fashion_quickstart --optim.gama.start 1",
            "no option --optim.gama.start; did you mean --optim.gamma.start",
        ),
        ("--config fashion_quickstart -epochs 3", "no option -epochs; did you mean --epochs"),
        ("--config fashion_quickstart --epoch=3", "no option --epoch; did you mean --epochs"),
    ],
)
def test_misspelt_names_get_the_nearest(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_train(arguments.split(), "t")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs many", "--epochs: invalid literal for int.*'many'"),
        ("--epochs 0", "epochs must be at least 1, not 0"),
        ("--optim.gamma.start 2", r"optim.gamma must stay in \(0, 1\], but reaches 2.0"),
        ("--engine.sharding zero7", "zero7"),
    ],
)
def test_bad_value_is_one_sentence(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_train(["--config", "fashion_quickstart", *arguments.split()], "t")
    assert "│" not in str(caught.value)
    assert "──" not in str(caught.value)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train("--config fashion_quickstart --help".split(), "t")
    text = capsys.readouterr().out
    text = text.replace("-", "_").replace("__", "--")
    missing = [name for name in option_names(load_config("fashion_quickstart")) if name not in text]
    assert not missing


@pytest.mark.parametrize("name", available())
def test_every_configuration_says_what_it_is(name: str) -> None:
    import importlib

    config = load_config(name)
    assert config.name == name
    header = importlib.import_module(f"bitfleet.configs.{name}").__doc__ or ""
    for entry in ("paper ", "machine ", "hours ", "expected ", "command "):
        assert f"\n{entry}" in header
    assert f"--config {name}" in header


def test_paper_values() -> None:
    """paper.md section 2: what the official sets hold."""
    expected = {
        "gamma": (1e-4, 1e-9),
        "sigma": (1e-5, 1e-2),
        "threshold": (1e-8, 1e-5),
        "lr": (2.5e-3, 5e-6),
    }
    for name, epochs, decay_steps in (("xnornet_imagenet", 100, 125_113), ("birealnet18_imagenet", 150, 187_670)):
        config = load_config(name)
        assert (config.epochs, config.global_batch_size) == (epochs, 1024)
        assert config.epochs * 1_281_167 // config.global_batch_size == decay_steps
        for key, (start, end) in expected.items():
            schedule: Schedule = getattr(config.optim, key)
            assert (schedule.kind, schedule.start, schedule.end, schedule.power) == ("polynomial", start, end, 1.0)
    assert load_config("binarynet_cifar10_as_coded").optim.correction == "as_coded"
