"""The command line as a user meets it: exit codes, messages, shipped configs."""

import json
import os
import subprocess
import sys

import pytest
from test_checkpoints_gguf import write_llama

import specjax
from specjax import cli

pytestmark = pytest.mark.usefixtures("own_cache")


def generate(model, *more):
    return cli.main(
        ["generate", "--config=generate_smollm2", f"--config.target={model}", "--config.sampling.max_tokens=12", *more]
    )


def test_generate_streams_the_answer_and_then_the_numbers(model, capfd):
    assert generate(model, "--prompt", "hello") == 0
    out, err = capfd.readouterr()
    assert out.strip() and "tokens/s" not in out
    assert "12 tokens" in err and "tokens/s" in err and "drafts accepted" in err


def test_generate_without_a_method_decodes_plainly_to_the_same_text(model, capfd):
    assert generate(model, "--prompt=hello") == 0
    speculative = capfd.readouterr().out
    assert generate(model, "--prompt=hello", "--config.speculative.method=") == 0
    out, err = capfd.readouterr()
    assert out == speculative and "drafts" not in err


@pytest.mark.parametrize("name", ["generate_smollm2", "generate_smollm2.py", "configs/generate_smollm2.py"])
def test_a_shipped_config_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.path.isfile(cli.config_path(name))


@pytest.mark.parametrize("command", cli.CONFIGS_OF)
def test_help_lists_options_and_the_configs_of_the_command(command, capsys):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--config" in out and cli.COMMANDS[command].__doc__ in out
    listed = [name for name in cli.shipped_configs() if f"  {name}  " in out]
    assert listed and all(name.startswith(cli.CONFIGS_OF[command]) for name in listed)


def test_every_config_is_listed_by_one_command():
    for name in cli.shipped_configs():
        assert sum(name.startswith(prefix) for prefix in cli.CONFIGS_OF.values()) == 1


def test_help_shows_a_config_and_its_fields(capsys):
    assert cli.main(["generate", "--config=generate_smollm2", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Command:" in out and "config.sampling" in out


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"specjax {specjax.__version__}\n"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.sampling.ignore_eos=True", ["fields of --config.sampling,", "top_p", "\"{'ignore_eos': VALUE}\""]),
        ("--config.mesh.rows=2", ["fields of --config.mesh,", "data, model"]),
        ("--config.chat.data=2", ["expected --config.chat=VALUE"]),
        ("--config.foo=1", ["fields of --config,", "sampling, speculative"]),
    ],
)
def test_an_unknown_field_of_a_config_is_answered_with_those_there_are(argument, said, capsys):
    assert cli.main(["generate", "--config=generate_smollm2", argument, "--prompt=x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"specjax: error: {argument}: expected") and all(part in err for part in said)


def test_a_group_of_a_config_can_be_replaced_by_fields_that_it_lacks(model, capfd):
    fields = {"method": "ngram", "num_speculative_tokens": "auto", "prompt_lookup_max": 2}
    assert generate(model, "--prompt=hello", f"--config.speculative={fields}") == 0
    assert "drafts accepted" in capfd.readouterr().err


def test_a_value_of_another_type_is_answered_with_how_to_give_it(capsys):
    argument = "--config.methods.eagle3.num_speculative_tokens=auto"
    assert cli.main(["evaluate", "--config=eval_smollm2", argument, "--workdir=w"]) == 2
    err = capsys.readouterr().err
    assert (
        argument in err
        and "'auto'" in err
        and "replace its group" in err
        and "'num_speculative_tokens': 'auto'}}" in err
    )


def test_no_command_prints_the_usage_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: specjax" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fly"], "'fly'"),
        (["generate"], "--config"),
        (["generate", "--config=nowhere.py", "--prompt=x"], "nowhere.py"),
        (["generate", "--config=generate_smollm2"], "--prompt"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "--config.targget=y"], "targget"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "--config.sampling.max_tokens=many"], "many"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "--config.sampling.max_tokens=0"], "max_tokens=0"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "--colour=red"], "colour"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "stray"], "stray"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "--config.speculative.method=magic"], "magic"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "--config.speculative.method=eagle3"], "eagle3"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "--config.target=smollm3"], "smollm3"),
        (["generate", "--config=generate_smollm2", "--prompt=x", "--config.dtype=int8"], "int8"),
        (
            ["generate", "--config=generate_smollm2", "--prompt=x", "--config.speculative.num_speculative_tokens=0"],
            "num_speculative_tokens=0",
        ),
        (["evaluate", "--config=eval_smollm2"], "--workdir"),
        (["evaluate", "--config=eval_smollm2", "--workdir=w", "--config.prompts=no.jsonl"], "no.jsonl"),
    ],
)
def test_user_mistakes_end_with_one_message_and_a_code(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    message = err.splitlines()[-1] if "loading" in err else err  # a progress bar may stand above it
    assert message.startswith("specjax: error:") and named in err and "Traceback" not in err


def test_an_empty_prompt_is_refused(model, capsys):
    assert generate(model, "--prompt=") == 2
    assert "empty" in capsys.readouterr().err


def test_a_prompt_beyond_the_context_is_refused(model, capsys):
    assert generate(model, "--prompt", "z" * 600) == 2
    assert "at most 511" in capsys.readouterr().err


def test_nan_weights_end_with_an_error(model, tmp_path, capsys):
    import numpy as np

    broken = write_llama(tmp_path / "nan.gguf", **{"output_norm.weight": np.full(32, np.nan, np.float32)})
    assert generate(broken, "--prompt=hello") == 2
    assert "not finite" in capsys.readouterr().err


def test_the_installed_command_runs_in_a_process_of_its_own(model, tmp_path):
    command = [sys.executable, "-m", "specjax.cli", "generate", "--config=generate_smollm2", f"--config.target={model}"]
    done = subprocess.run([*command, "--prompt=hello"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr


def test_importing_the_package_imports_neither_transformers_nor_torch():
    program = "import sys, specjax.cli; print(sorted({'transformers', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_shipped_config_builds_and_documents_itself():
    import importlib

    for name in cli.shipped_configs():
        module = importlib.import_module(f"specjax.configs.{name}")
        assert "Command:" in module.__doc__ and "Minutes:" in module.__doc__ and "Expected:" in module.__doc__
        assert "TODO" not in module.__doc__
        json.dumps(module.get_config().to_json_best_effort())
