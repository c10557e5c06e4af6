"""`hf-compress completion bash`: a script with which a shell completes verbs, methods, options and their values."""

import argparse
import sys
from collections.abc import Iterable, Mapping

from hf_compress.commands.compare import compare_parser
from hf_compress.commands.convert import OWN, convert_parser
from hf_compress.commands.doctor import doctor_parser
from hf_compress.commands.main import VERBS
from hf_compress.commands.parser import Parser
from hf_compress.commands.picture import picture_parser
from hf_compress.commands.publish import publish_parser
from hf_compress.commands.run import run_parser
from hf_compress.commands.shrink import shrink_parser
from hf_compress.commands.stage import methods, stage_parser
from hf_compress.commands.tune import tune_parser
from hf_compress.commands.vary import vary_parser
from hf_compress.formats.export import FORMATS
from hf_compress.recipe.recipe import ready_recipes
from hf_compress.recipe.stages import ALIASES, method_of
from hf_compress.recipe.tasks.table import TASKS
from hf_compress.shrinking.run import RUNTIMES_OF_SHRINK

SHELLS = ("bash", "zsh")
STAGES = ("fine-tune", "distill", "prune", "quantize")
IN_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
SCRIPT = """# Completes hf-compress, made by `hf-compress completion`. What is no option is a file.
_hf_compress() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" verb="${{COMP_WORDS[1]}}"
  local method="" choices="" i
  case "$verb" in distil) verb=distill ;; finetune) verb=fine-tune ;; esac
  for ((i = 2; i < COMP_CWORD; i++)); do
    [ "${{COMP_WORDS[i]}}" = --method ] && method="${{COMP_WORDS[i + 1]}}"
  done
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    choices="{verbs}"
  else
    case "$verb $before" in
{values}
    *)
      case "$word" in --*)
        case "$verb $method" in
{options}
        esac
        [[ "${{word#--}}" == *-* ]] && choices="${{choices//_/-}}" ;;
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$choices" -- "$word"))
}}
complete -o default -F _hf_compress hf-compress
"""


def run(verb: str, arguments: list[str]) -> int:
    sys.stdout.write(script(completion_parser().parse_all(arguments).shell))
    return 0


def completion_parser() -> Parser:
    parser = Parser("hf-compress completion", description="Write a script that completes hf-compress in a shell. For "
                    "zsh, write it where .zshrc sources it.")  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, help="The shell that will read it.")
    return parser


OTHERS = {"run": run_parser, "publish": publish_parser, "convert": convert_parser, "tune": tune_parser,
          "vary": vary_parser, "picture": picture_parser, "shrink": shrink_parser, "doctor": doctor_parser,
          "completion": completion_parser}  # fmt: skip


def parser_of(verb: str, method: str | None = None) -> Parser:
    """What reads the words after a verb; of one that makes a stage, for a method or its usual one."""
    if verb in STAGES:
        return stage_parser(verb, method_of(ALIASES.get(verb, verb), method))
    return OTHERS[verb]() if verb in OTHERS else compare_parser(verb)


def options_of(parser: Parser) -> list[str]:
    """Those that its help shows."""
    shown = (action for action in parser._actions if action.help != argparse.SUPPRESS)
    return [name for action in shown for name in action.option_strings if name.startswith("--")]


def script(shell: str) -> str:
    """The whole of it: the shell asks nobody, so that a key press costs nothing."""
    values = {"shrink --runtime": RUNTIMES_OF_SHRINK, "convert --format": (OWN, *FORMATS), "* --task": TASKS,
              "completion completion": SHELLS, "run run": ready_recipes()}  # fmt: skip
    options = {}
    for verb in VERBS:
        if verb in STAGES:
            names = methods(ALIASES.get(verb, verb))
            options |= {f"{verb} {name}": options_of(parser_of(verb, name)) for name in names if name != verb}
            if verb not in names:
                values[f"{verb} --method"] = names
        options[f"{verb} *"] = options_of(parser_of(verb))
    text = SCRIPT.format(verbs=" ".join(VERBS), values=_cases(values, 4), options=_cases(options, 8))
    return IN_ZSH * (shell == "zsh") + text


def _cases(choices: Mapping[str, Iterable[str]], indent: int) -> str:
    """A shell's cases, in whose patterns a star stays one."""
    return "\n".join(f'{" " * indent}{quote(case)}) choices="{" ".join(words)}" ;;' for case, words in choices.items())


def quote(case: str) -> str:
    return '"' + case.replace("*", '"*"') + '"'
