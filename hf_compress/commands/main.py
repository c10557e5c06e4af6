"""`hf-compress <verb> ...`: chooses the verb, and says in a sentence what went wrong.

Exit codes: 0, 2 for what the user can mend (options, files, data, rights), 1 for what failed, 3 for a wish to
`shrink` that was missed, 130 for Ctrl-C.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from hf_compress.training.ranks import is_main, may_tell
from hf_compress.version import __version__

INTERRUPTED = 130  # as shells count it: 128 and the number of the signal
VERBS = {  # verb -> (module, what it does)
    "shrink": ("hf_compress.commands.shrink", "make a model as fast or as small as you say"),
    "run": ("hf_compress.commands.run", "run a recipe: a file, or one that comes with the package"),
    "fine-tune": ("hf_compress.commands.stage", "train a model on your labels or texts: a teacher to begin with"),
    "distill": ("hf_compress.commands.stage", "train a student to follow its teacher"),
    "prune": ("hf_compress.commands.stage", "cut heads, neurons, layers, tokens, blocks or weights"),
    "quantize": ("hf_compress.commands.stage", "store weights in 2, 3, 4 or 8 bits"),
    "evaluate": ("hf_compress.commands.compare", "measure one model: quality, size, speed"),
    "compare": ("hf_compress.commands.compare", "measure several models side by side"),
    "publish": ("hf_compress.commands.publish", "send a model with its card to the Hub"),
    "convert": ("hf_compress.commands.convert", "write a model in another format"),
    "picture": ("hf_compress.commands.picture", "draw heads, neurons, bits and blocks of a saved model"),
    "vary": ("hf_compress.commands.vary", "run a recipe with several values of some options"),
    "tune": ("hf_compress.commands.tune", "measure the kernels' tiles on this machine's GPU"),
    "doctor": ("hf_compress.commands.doctor", "say what would run here, and what is missing to be fast"),
    "completion": ("hf_compress.commands.completion", "write a script that completes commands in bash or zsh"),
}
SPELLINGS = {"distil": "distill", "finetune": "fine-tune"}
USAGE = """hf-compress VERB [options]

{verbs}

`hf-compress VERB --help` tells more of each; --version says which this is. With
every verb, --verbose shows what libraries tell too, --debug where an error came
from. Exit codes: 0; 2 for what you can mend (options, files, data, rights); 1
for what failed; 3 for a wish to `shrink` that was missed; 130 for Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags = {flag for flag in ("--debug", "--verbose") if flag in arguments}
    arguments = [word for word in arguments if word not in flags]
    if not arguments or arguments[0] in ("-h", "--help", "help", "--version"):
        sys.stdout.write(f"hf_compress {__version__}\n" if arguments[:1] == ["--version"] else usage())
        return 0
    return guarded(lambda: _run(arguments), verbose="--verbose" in flags, debug="--debug" in flags)


def guarded(run: Callable[[], int | None], *, verbose: bool = False, debug: bool = False) -> int:
    """Run something long for a person: what libraries tell stays away, and an error is a sentence. Returns the exit
    code."""
    from hf_compress.training.progress import quiet  # heavy, and `--help` needs none of it

    level = logging.WARNING if is_main() else logging.ERROR  # of several processes one tells how far they are
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        with quiet(enabled=not verbose):
            return run() or 0
    except SystemExit as stop:  # of --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _fail("Interrupted. Run the same command again to go on: what is finished is kept.", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_sentence(error), 2 if _is_the_users(error) else 1)


def _run(arguments: list[str]) -> int:
    verb = SPELLINGS.get(arguments[0], arguments[0])
    if verb not in VERBS:
        from hf_compress.recipe.options import unknown

        raise unknown(verb, VERBS, "The verb")
    run: Callable[[str, list[str]], int] = import_module(VERBS[verb][0]).run
    return run(verb, arguments[1:])


def usage() -> str:
    return USAGE.format(verbs="\n".join(f"  {verb:12}{text}" for verb, (_, text) in VERBS.items()))


def _is_the_users(error: Exception) -> bool:
    """What is wrong with the request. The package's doors raise ValueError and TypeError for nothing else."""
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return True
    from hf_compress.recipe.options import RecipeError

    if isinstance(error, RecipeError):
        return True
    return isinstance(error, (ValueError, TypeError)) and _raised_by_us(error)


def _raised_by_us(error: Exception) -> bool:
    """Whether a line of this package raised it, and not one deep inside a library."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("hf_compress")


def _sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if type(error) in (KeyError, AttributeError, AssertionError, RuntimeError) or not str(error).strip():
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


def _fail(text: str, code: int) -> int:
    """Of several processes one says what ended it; what the others meet then is that it is gone."""
    if code == INTERRUPTED and is_main() or code != INTERRUPTED and may_tell():
        where = f" (process {os.environ['RANK']})" if not is_main() else ""
        sys.stderr.write(f"hf-compress{where}: {text}\n")
    return code


def entry_point() -> None:
    leave(main())


def leave(code: int) -> NoReturn:
    """End this process; after Ctrl-C at once: what is on disk is whole, and threads would only be waited for."""
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry_point()
