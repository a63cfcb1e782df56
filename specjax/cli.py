"""The specjax command: generate, evaluate, report, train and their kin, most driven by a config file."""

import ast
import contextlib
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from specjax.errors import ConfigError, SpecJAXError

USAGE = """usage: specjax COMMAND --config=FILE [--config.FIELD=VALUE ...] [options]

commands:
  generate   stream the answer to one prompt         specjax generate --config=generate_smollm2 --prompt "Hello"
  evaluate   measure methods against plain decoding  specjax evaluate --config=eval_smollm2 --workdir=DIR
  report     write or merge reports of evaluations   specjax report DIR [DIR ...] [--out=DIR]
  benchmark  measure the project's speed claims      specjax benchmark --config=bench_smollm2 --workdir=DIR
  respond    answer training prompts                 specjax respond --config=respond_smollm2 --workdir=DIR
  train      train a draft head                      specjax train --config=train_eagle3_smollm2 --workdir=DIR
  export     write a head for other systems          specjax export --source=DIR --out=DIR
  preflight  what a TPU you don't have would do      specjax preflight --config=preflight_llama31_8b_eagle3 \\
                                                       --topology=v6e:2x2 [--workdir=DIR]

A config is a Python file with get_config(); those that come with SpecJAX can be named without path and ending.
--config.GROUP="{'NAME': VALUE}" puts a group of fields in the place of the file's, with names that it lacks too.
specjax COMMAND --help lists the options and configs of a command; specjax --version says the version.
"""

INTERRUPTED = 130
FAILED = 2
DOES_NOT_FIT = 3
RESUMABLE = ("evaluate", "respond", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0, 2 after an error that a message explains, 3 where preflight finds that memory does not
        suffice, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else FAILED
    if arguments[0] in ("--version", "version"):
        from specjax import __version__

        print(f"specjax {__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    try:
        if command is None:
            raise ConfigError(f"command={arguments[0]!r}: expected one of {', '.join(COMMANDS)}; see specjax --help.")
        return command(arguments[1:])
    except SpecJAXError as error:
        return _stopped(f"error: {error}", FAILED)
    except OSError as error:
        return _stopped(f"error: {error}; check the path, its permissions and the space left.", FAILED)
    except KeyboardInterrupt:
        kept = "; the same command goes on where it stopped" if arguments[0] in RESUMABLE else ""
        print(file=sys.stderr)
        return _stopped(f"interrupted{kept}.", INTERRUPTED)


def _stopped(message: str, code: int) -> int:
    """Says why the command ends, to other processes of it too. Returns the exit code."""
    print(f"specjax: {message}", file=sys.stderr)
    if "specjax.processes" in sys.modules:
        from specjax import processes

        processes.end_all(message.removeprefix("error: "), code)
    return code


def run_generate(arguments: list[str]) -> int:
    """Streams one answer to standard output, and the numbers to standard error."""
    config, flags = parse("generate", arguments, {"prompt": "The text to answer. Required."})
    if config is None:
        return 0
    prompt = flags["prompt"]
    if prompt is None:
        raise ConfigError('--prompt: is missing; expected a text, such as --prompt "Name three primary colours."')
    from specjax import processes
    from specjax.checkpoints.load import load_target
    from specjax.config import SamplingParams, SpeculativeConfig
    from specjax.evaluate.files import plain_dict
    from specjax.evaluate.run import check_finite
    from specjax.generate import SpeculativeDecoder
    from specjax.sharding import read_mesh

    fields = plain_dict(config)
    processes.join(fields.pop("distributed", None))
    processes.same_everywhere(fields | {"prompt": prompt}, "config")
    sampling = SamplingParams.model_validate(plain_dict(config.sampling))
    method = SpeculativeConfig.model_validate(plain_dict(config.speculative)) if config.speculative.method else None
    target = load_target(config.target, dtype=config.dtype or None, mesh=read_mesh(fields.get("mesh")))
    stream = SpeculativeDecoder(target, method, max_batch_size=1).stream([prompt], sampling, chat=config.chat)
    for chunk in stream:
        if processes.is_writer():
            print(chunk.text, end="", flush=True)
    result = stream.result
    assert result is not None  # the iterator is exhausted
    if processes.is_writer():
        print()
        _print_numbers(result, method)
    check_finite(result.finish_reasons, config.target)
    return 0


def _print_numbers(result: Any, method: Any) -> None:
    """What a GenerationResult says of speed. method: its SpeculativeConfig, or None."""
    metrics = result.metrics
    drafts = f"{metrics.accepted} of {metrics.drafted} drafts accepted, " if method else ""
    print(
        f"[{metrics.num_tokens} tokens, {metrics.tokens_per_second:.1f} tokens/s, {metrics.acceptance_length:.2f} "
        f"tokens a round, {drafts}first token after {metrics.time_to_first_token:.2f} s, compiled in "
        f"{metrics.compile_seconds:.1f} s]",
        file=sys.stderr,
    )
    if method and not result.lossless:
        print(f"[lossy: {method.rejection_sampling_strategy} does not keep the target's distribution]", file=sys.stderr)


def run_evaluate(arguments: list[str]) -> int:
    """Decodes prompts plainly and with each method, and writes results.jsonl, summary.json and a report on them."""
    return _measure("evaluate", arguments)


def run_benchmark(arguments: list[str]) -> int:
    """Measures what the README claims of speed, and writes benchmark.json."""
    return _measure("benchmark", arguments)


def _measure(command: str, arguments: list[str]) -> int:
    config, workdir = _config_and_workdir(command, arguments, "The folder for results. Required.")
    if config is None:
        return 0
    from specjax import processes
    from specjax.evaluate import benchmark, report, run

    if command == "benchmark":
        with report.progress() as advance:
            results = benchmark.benchmark(config, workdir, advance)
        print(f"{report.benchmark_table(results)}\nwritten to {workdir}")
        return 0
    try:
        with _progress() as advance:
            summary = run.evaluate(config, workdir, advance)
    except KeyboardInterrupt:
        if processes.is_writer() and (Path(workdir) / report.SUMMARY).is_file():
            report.write_report([workdir])
        raise
    if not processes.is_writer():
        return 0
    report.write_report([workdir])
    failed = summary["failed"]
    rows = {"plain": summary["baseline"], **summary["methods"]}
    unmeasured = [name for name, row in rows.items() if not row["num_tokens"]]
    if unmeasured:
        raise SpecJAXError(f"nothing could be measured of {', '.join(unmeasured)}: {failed[0]['error']}")
    print(f"{report.summary_table(summary)}\nwritten to {workdir}")
    if failed:
        first = f"{failed[0]['method']} on {failed[0]['prompt']}, turn {failed[0]['turn']}: {failed[0]['error']}"
        print(f"specjax: {len(failed)} measurements failed, the first one {first}", file=sys.stderr)
    wrong = {name: row["mismatch"] for name, row in summary["methods"].items() if row["mismatch"]}
    if wrong:
        raise SpecJAXError(f"texts differ from plain decoding by more than rounding (method: prompts): {wrong}.")
    return 0


def run_respond(arguments: list[str]) -> int:
    """Answers training prompts with the target, and writes responses.jsonl."""
    config, workdir = _config_and_workdir("respond", arguments, "The folder for responses.jsonl. Required.")
    if config is None:
        return 0
    from specjax import processes
    from specjax.train.respond import FILE, respond

    with _progress() as advance:
        counts = respond(config, workdir, advance)
    if not processes.is_writer():
        return 0
    print(
        f"{counts['responses']} responses to {counts['prompts']} prompts, {counts['tokens']} tokens\n"
        f"written to {Path(workdir) / FILE}"
    )
    return 0


def run_train(arguments: list[str]) -> int:
    """Trains a draft head, and writes head/, metrics.jsonl, tensorboard/ and summary.json."""
    config, workdir = _config_and_workdir("train", arguments, "The folder for the head and its logs. Required.")
    if config is None:
        return 0
    from specjax import processes
    from specjax.train import trainer

    with _progress() as advance:
        summary = trainer.train(trainer.TrainConfig.from_config(config), workdir, advance)
    if not processes.is_writer():
        return 0
    final = summary["validation"] or summary["final"]
    print(
        f"{summary['steps']} steps, {summary['tokens']} tokens in {summary['minutes']:.1f} minutes; "
        f"loss {final['loss']:.3f}, expected acceptance length {final['expected_acceptance_length']:.2f}"
        f"{' on held-out text' if summary['validation'] else ''}\nwritten to {workdir}"
    )
    return 0


def run_report(arguments: list[str]) -> int:
    """Writes report.md and report.html of an evaluation, or of several side by side."""
    import argparse

    parser = argparse.ArgumentParser("specjax report", description=run_report.__doc__, allow_abbrev=False)
    parser.add_argument("directories", metavar="DIR", nargs="+", help="The --workdir of an evaluation.")
    parser.add_argument("--out", help="The folder to write to. Default: the evaluation's own; required for several.")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stopped:  # argparse has printed help, or what is wrong
        return 0 if not stopped.code else FAILED
    from specjax.evaluate import report

    folder, warnings = report.write_report(options.directories, options.out)
    for warning in warnings:
        print(f"specjax: warning: {warning}", file=sys.stderr)
    print(f"written to {folder / report.HTML} and {folder / report.MARKDOWN}")
    return 0


EXPORT_OPTIONS = {
    "source": "The workdir of a training, or a head's checkpoint. Required.",
    "out": "The directory to write. Required.",
    "target": "The model that the head drafts for. Known of trainings, else required.",
    "num_speculative_tokens": "Drafts a round where its user names no number. Default: what the source says, or 4.",
    "dtype": "Of the weights: bfloat16 (default), float16 or float32.",
}


def run_export(arguments: list[str]) -> int:
    """Writes a head in the speculators format."""
    import argparse

    parser = argparse.ArgumentParser("specjax export", description=run_export.__doc__, allow_abbrev=False)
    for name, about in EXPORT_OPTIONS.items():
        parser.add_argument(f"--{name}", default="", help=about)
    try:
        options = vars(parser.parse_args(arguments))
    except SystemExit as stopped:  # argparse has printed help, or what is wrong
        return 0 if not stopped.code else FAILED
    for name in ("source", "out"):
        if not options[name]:
            raise ConfigError(f"--{name}: is missing; see specjax export --help.")
    number = options["num_speculative_tokens"] or "0"
    if not number.isdecimal():
        raise ConfigError(f"--num_speculative_tokens={number!r}: expected an integer >= 1.")
    dtype = options["dtype"] or "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype={dtype!r}: expected bfloat16, float16 or float32.")
    from specjax.train.export import export

    print(f"written to {export(options['source'], options['out'], options['target'], int(number), dtype)}")
    return 0


def _progress() -> Any:
    """The progress bar of process 0; the others, which measure the same, have none."""
    from specjax import processes
    from specjax.evaluate import report

    return report.progress() if processes.is_writer() else contextlib.nullcontext()


PREFLIGHT_OPTIONS = {
    "topology": "The chips to compile for, such as v5e:2x4, v5p:2x2x2, v6e:2x2 or tpu7x:2x2x1. Required.",
    "workdir": "The folder for preflight.json and preflight.svg. Default: none are written.",
}


def run_preflight(arguments: list[str]) -> int:
    """Compiles for TPUs that need not be there, and says what they would do."""
    config, flags = parse("preflight", arguments, PREFLIGHT_OPTIONS)
    if config is None:
        return 0
    topology, workdir = flags["topology"], flags["workdir"] or ""
    if not topology:
        raise ConfigError("--topology: is missing; expected a chip and a layout, such as --topology=v6e:2x2.")
    from rich.console import Console

    from specjax.evaluate.report import progress
    from specjax.preflight.report import tables
    from specjax.preflight.run import preflight

    with progress() as advance:
        summary = preflight(config, topology, workdir, advance)
    Console().print(*tables(summary), sep="\n")
    if workdir:
        print(f"written to {workdir}")
    return 0 if summary["fits"] else DOES_NOT_FIT


def _config_and_workdir(command: str, arguments: list[str], about: str) -> tuple[Any, str]:
    """The config, whose processes are joined, and --workdir; (None, "") after --help.

    Raises:
        ConfigError: --workdir is missing.
    """
    config, flags = parse(command, arguments, {"workdir": about})
    if config is None:
        return None, ""
    if not flags["workdir"]:
        raise ConfigError(f"--workdir: is missing; expected a folder for the results, such as workdir/{command}")
    from specjax import processes

    processes.join(config.get("distributed"))
    return config, flags["workdir"]


OTHER_TYPE = (
    ". A field takes values of the type it has in the config. For others replace its group as a whole: "
    "--config.methods=\"{'name': {'method': 'ngram', 'num_speculative_tokens': 'auto'}}\"."
)


def parse(command: str, arguments: list[str], options: dict[str, str]) -> tuple[Any, dict[str, str | None]]:
    """Reads --config, --config.FIELD=VALUE and a command's text options.

    Returns:
        The locked config and the options' values; (None, {}) where --help was asked for and printed.

    Raises:
        ConfigError: an unknown option or field, a value of the wrong type, or a config that can't be read.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    resolved = [command, *resolve_config_argument(arguments)]
    about = "The experiment: a config file, or the name of a shipped one."
    config_flags.DEFINE_config_file("config", None, about, flag_values=values, sys_argv=resolved)
    for name, help_text in options.items():
        flags.DEFINE_string(name, None, help_text, flag_values=values)
    if any(argument in ("-h", "--help") for argument in arguments):
        _print_help(command, resolved[1:], options)
        return None, {}
    try:
        rest = values(resolved)
    except Exception as error:  # the config file is a program of the user's, and absl raises many kinds
        message = _unknown_field(command, resolved[1:]) or f"{' '.join(arguments)}: {_first_line(error)}"
        if isinstance(error, flags.IllegalFlagValueError):
            message += OTHER_TYPE
        raise ConfigError(message) from error
    if rest[1:]:
        raise ConfigError(f"argument {rest[1]!r}: expected only --NAME=VALUE options; see specjax {command} --help.")
    if values.config is None:
        raise ConfigError(f"--config: is missing; expected a file, or one of {', '.join(shipped_configs())}.")
    return values.config, {name: values[name].value for name in options}


def _named_config(arguments: list[str]) -> str:
    """The file that --config=FILE names; "" where none does."""
    named = (argument.partition("=")[2] for argument in arguments if argument.startswith(("--config=", "-config=")))
    return next(named, "")


def _unknown_field(command: str, arguments: list[str]) -> str:
    """What to say of the first --config.FIELD that the config does not have; "" if there is none."""
    from ml_collections import ConfigDict

    try:
        config = runpy.run_path(_named_config(arguments))["get_config"]()
    except Exception:  # what is wrong is the file, and the caller's to say
        return ""
    for argument in arguments:
        if not argument.startswith("--config."):
            continue
        found, parents = config, ["--config"]
        for name in argument.partition("=")[0].split(".")[1:]:
            group = ".".join(parents)
            if not isinstance(found, ConfigDict):
                return f"{argument}: expected {group}=VALUE; the config has one value there, now {found!r}."
            if name not in found:
                others = f"to give others replace the group, {group}=\"{{'{name}': VALUE}}\". " * (group != "--config")
                return (
                    f"{argument}: expected one of the fields of {group}, {', '.join(map(str, found))}; {others}"
                    f"specjax {command} --config=NAME --help explains the fields."
                )
            found, parents = found[name], [*parents, name]
    return ""


def _print_help(command: str, arguments: list[str], options: dict[str, str]) -> None:
    """Says what a command does, takes and reads; or shows the config that arguments name, which explains its fields."""
    named = _named_config(arguments)
    if named:
        print(f"# {named}\n{Path(named).read_text(encoding='utf-8')}", end="")
        return
    print(
        f"usage: specjax {command} --config=FILE [--config.FIELD=VALUE ...]\n\n{COMMANDS[command].__doc__}\n\noptions:"
    )
    print("  --config  A Python file with get_config(), or the name of one that comes with SpecJAX. Required.")
    for name, about in options.items():
        print(f"  --{name}  {about}")
    print(f"\nconfigs that come with SpecJAX, in {resources.files('specjax.configs')}:")
    names = [name for name in shipped_configs() if name.startswith(CONFIGS_OF[command])]
    width = max(len(name) for name in names)
    for name in names:
        docstring = ast.get_docstring(ast.parse(Path(config_path(name)).read_text(encoding="utf-8"))) or ""
        about, _, _ = docstring.partition("\n")
        print(f"  {name:{width}}  {about}")
    print(f"\nspecjax {command} --config=NAME --help shows a config, which explains its fields.")


def shipped_configs() -> list[str]:
    """Names of the configs that come with SpecJAX."""
    folder = resources.files("specjax.configs")
    return sorted(
        item.name.removesuffix(".py")
        for item in folder.iterdir()
        if item.name.endswith(".py") and not item.name.startswith("_")
    )


def resolve_config_argument(arguments: list[str]) -> list[str]:
    """Puts the full path of a shipped config in the place of its name."""
    resolved = []
    expects_name = False
    for argument in arguments:
        if expects_name:
            argument, expects_name = config_path(argument), False
        elif argument in ("--config", "-config"):
            expects_name = True
        elif argument.startswith(("--config=", "-config=")):
            flag, name = argument.split("=", 1)
            argument = f"{flag}={config_path(name)}"
        resolved.append(argument)
    return resolved


def config_path(name: str) -> str:
    """The file that a --config value means: a path, or a shipped config with or without folder and ending.

    Raises:
        ConfigError: neither.
    """
    if Path(name).is_file():
        return name
    stem = Path(name).name.removesuffix(".py")
    if stem in shipped_configs() and Path(name).parent.as_posix() in (".", "configs"):
        return str(resources.files("specjax.configs").joinpath(f"{stem}.py"))
    raise ConfigError(f"--config={name!r}: no such file; expected a path or one of {', '.join(shipped_configs())}.")


def _first_line(error: Exception) -> str:
    lines = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "generate": run_generate,
    "evaluate": run_evaluate,
    "report": run_report,
    "benchmark": run_benchmark,
    "respond": run_respond,
    "train": run_train,
    "export": run_export,
    "preflight": run_preflight,
}

# What the names of its configs begin with.
CONFIGS_OF = {"evaluate": "eval", "benchmark": "bench"} | {
    name: name for name in ("generate", "respond", "train", "preflight")
}

if __name__ == "__main__":
    sys.exit(main())
