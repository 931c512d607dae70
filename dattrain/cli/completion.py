"""``dattrain completion bash|zsh|fish``: a script that completes verbs, options, recipes and keys, from the parsers and the schema.

The script holds what it offers, so that pressing Tab starts no Python: print it anew after an update.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")
HOW = {
    "bash": "# dattrain completion bash > ~/.local/share/bash-completion/completions/dattrain\n",
    "zsh": "# Put this line into ~/.zshrc, behind compinit:  source <(dattrain completion zsh)\n",
    "fish": "# dattrain completion fish > ~/.config/fish/completions/dattrain.fish\n",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("shell", choices=SHELLS, help="for this shell; its first lines say where it belongs")


def run(args: argparse.Namespace) -> int:
    """Print the script; exit code 0."""
    from dattrain.cli.main import VERBS

    print(script(args.shell, {verb: words_of(verb, *about) for verb, about in VERBS.items()}), end="")
    return 0


@dataclass(frozen=True)
class Words:
    """What may follow a verb."""

    about: str
    options: tuple[str, ...]
    """Of the verb and of its actions."""
    first: tuple[str, ...]
    """Actions, or names that are there for the first word; a path may stand in place of a name."""
    keys: tuple[str, ...]
    """``key=``, and ``key=value`` where the values can be listed."""


def words_of(verb: str, module: str, about: str) -> Words:
    """What may follow ``verb``, by the parser that ``module`` makes."""
    from dattrain.config import reference, shipped

    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(module).add_arguments(parser)
    options = [*_options(parser), "--help"]
    first: list[str] = []
    takes_keys = any(action.dest == "overrides" for action in parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            first += action.choices
            for inner in action.choices.values():
                options += _options(inner)
                takes_keys |= any(each.dest == "overrides" for each in inner._actions)
        elif not action.option_strings and action.choices:
            first += action.choices
    if takes_keys and verb in ("train", "submit", "plan"):
        first += shipped.names()
        first += shipped.names(shipped.CHAINS) if verb == "submit" else []
    keys: list[str] = []
    if takes_keys:
        for key in reference.all_keys():
            keys += [f"{key.name}={choice}" for choice in key.choices] or [f"{key.name}="]
    return Words(about, tuple(dict.fromkeys(options)), tuple(dict.fromkeys(first)), tuple(keys))


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [
        option for action in parser._actions for option in action.option_strings if option.startswith("--")
    ]


def script(shell: str, verbs: Mapping[str, Words]) -> str:
    """The text of the script."""
    return HOW[shell] + {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](verbs)


def _cases(verbs: Mapping[str, Words], quotes: tuple[str, str]) -> str:
    """The branches of a ``case`` over verbs that sets ``options``, ``first`` and ``keys``; none of the words needs quotes of its own."""
    begin, end = quotes
    return "".join(
        f"    {verb})\n"
        f"      options={begin}{' '.join(words.options)}{end}\n"
        f"      first={begin}{' '.join(words.first)}{end}\n"
        f"      keys={begin}{' '.join(words.keys)}{end} ;;\n"
        for verb, words in verbs.items()
    )


def _bash(verbs: Mapping[str, Words]) -> str:
    return f"""_dattrain() {{
  local line="${{COMP_LINE:0:$COMP_POINT}}" options='' first='' keys='' offered word
  local -a typed
  # By spaces alone: bash's own words are divided at the = too. Without -f a * would become names of files.
  case "$-" in *f*) typed=($line) ;; *) set -f; typed=($line); set +f ;; esac
  case "$line" in *' ') typed+=('') ;; esac
  word="${{typed[${{#typed[@]}} - 1]}}"
  if [ "${{#typed[@]}}" -le 2 ]; then
    offered='{" ".join(verbs)} --help --version'
  else
    case "${{typed[1]}}" in
{_cases(verbs, ("'", "'"))}    esac
    case "$word" in
      -*) offered="$options" ;;
      *) offered="$keys"; [ "${{#typed[@]}}" -eq 3 ] && offered="$first" ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$offered" -- "$word"))
  # What is replaced begins behind the last =, where that divides words.
  case "$word" in
    *=*) case "${{COMP_WORDBREAKS-}}" in *=*) COMPREPLY=("${{COMPREPLY[@]#"${{word%=*}}="}}") ;; esac ;;
  esac
  case "${{COMPREPLY[0]-}}" in *=) compopt -o nospace 2> /dev/null ;; esac
}}
complete -o default -F _dattrain dattrain
"""


def _zsh(verbs: Mapping[str, Words]) -> str:
    return f"""_dattrain() {{
  local -a options first keys
  if (( CURRENT == 2 )); then
    compadd -- {" ".join(verbs)} --help --version
    return
  fi
  case "$words[2]" in
{_cases(verbs, ("(", ")"))}  esac
  if [[ "$words[CURRENT]" == -* ]]; then
    compadd -- $options
    return
  fi
  (( CURRENT == 3 )) && compadd -- $first
  compadd -S '' -- ${{(M)keys:#*=}}
  compadd -- ${{keys:#*=}}
  _files
}}
compdef _dattrain dattrain
"""


def _fish(verbs: Mapping[str, Words]) -> str:
    lines = [
        "complete -c dattrain -n __fish_use_subcommand -l help",
        "complete -c dattrain -n __fish_use_subcommand -l version",
    ]
    for verb, words in verbs.items():
        lines.append(f"complete -c dattrain -f -n __fish_use_subcommand -a {verb} -d {_quoted(words.about)}")
        seen = f"-n '__fish_seen_subcommand_from {verb}'"
        lines += [f"complete -c dattrain {seen} -l {option.removeprefix('--')}" for option in words.options]
        offered: Sequence[str] = (*words.first, *words.keys)
        if offered:
            lines.append(f"complete -c dattrain {seen} -a {_quoted(' '.join(offered))}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
