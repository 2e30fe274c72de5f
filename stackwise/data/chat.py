"""Conversations, and pairs of answers, as rows of tokens that say which of them are scored.

A row is `messages`; or `prompt` and `completion`; or `prompt`, `chosen` and `rejected`, each text or a list of
messages. Messages become text by a chat template (jinja, as transformers has them); text is taken as it stands.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stackwise import files
from stackwise.data import documents
from stackwise.data.documents import CHAT_COLUMNS, PAIR, SCORED, Document, TokenDocument, repair, token_document
from stackwise.data.tokenizer import Tokenizer
from stackwise.durable import write_bytes
from stackwise.errors import NotFound, StackWiseError, UsageError, line_of
from stackwise.identity import digest

if TYPE_CHECKING:
    import jinja2

MESSAGES, PROMPT, COMPLETION, CHOSEN, REJECTED, MARGIN = CHAT_COLUMNS

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "plain": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
"""Templates that are known by name."""

ASSISTANT = "assistant"
_FILE_BYTES = 4 << 20
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_ROW = "a row has messages; prompt and completion; or prompt, chosen and rejected"


@dataclass(frozen=True, repr=False)
class Chat:
    """How conversations become tokens.

    Args:
        tokenizer: Makes the tokens; names of special tokens in a template's text are these tokens.
        template: The jinja text; None: there is none, and messages are refused.
        specials: What the template may name, such as `bos_token`.
        makes: The column that says what of a row becomes tokens: a conversation with its answers (`SCORED`), a pair's
            chosen and rejected side (`PAIR`), or a prompt alone (`documents.PROMPT`).
    """

    tokenizer: Tokenizer | None
    template: str | None = None
    specials: Mapping[str, str] = field(default_factory=dict)
    makes: str = SCORED

    def __repr__(self) -> str:
        """What it does to a row, for identities."""
        # That it makes pairs, or conversations, is said as it always was: data prepared before is found again.
        makes = self.makes == PAIR if self.makes in (PAIR, SCORED) else self.makes
        about = [None if self.tokenizer is None else self.tokenizer.id, self.template, dict(self.specials), makes]
        return f"chat {digest(json.dumps(about, sort_keys=True).encode())}"

    @classmethod
    def of(cls, setting: str | None, tokenizer: Tokenizer | None, directory: Path | None, *, makes: str) -> Chat:
        """What the settings say.

        Args:
            setting: `data.chat_template`.
            tokenizer: The tokenizer, where there is one before the text is read.
            directory: Where its files are, which may bring a template.

        Raises:
            NotFound: The template's file does not exist.
            UsageError: It cannot be read, or is no template.
        """
        config = {} if directory is None else _tokenizer_config(directory)
        specials = {name: text for name in _SPECIALS if (text := _name_of(config.get(name))) is not None}
        if setting is None:
            template = None if directory is None else _own_template(directory, config)
        else:
            template = TEMPLATES.get(setting)
            if template is None:
                template = _file(Path(files.expanded(setting)))
        chat = cls(tokenizer, template, specials, makes)
        if template is not None:
            _ = chat._compiled  # a fault in it is told before anything is read
        return chat

    def document(self, where: str, row: Mapping[str, Any]) -> Document | None:
        """The document of a row; None: nothing in it can be scored.

        Raises:
            UsageError: The row is none of these, or its parts do not fit together.
        """
        if self.tokenizer is None:
            raise UsageError(
                f"{where}: conversations need a tokenizer that is there before they are read",
                hint="set data.tokenizer to bytes or the path of a tokenizer.json; init.weights brings its own",
            )
        if self.makes == documents.PROMPT:
            return self._prompt(where, row)
        return self._pair(where, row) if self.makes == PAIR else self._conversation(where, row)

    def _prompt(self, where: str, row: Mapping[str, Any]) -> TokenDocument:
        """A prompt, up to where its answer begins; messages are one up to the last of the assistant."""
        assert self.tokenizer is not None
        prompt = row.get(PROMPT)
        if prompt is None and row.get(MESSAGES) is not None:
            messages = _messages(where, MESSAGES, row[MESSAGES])
            prompt = messages[:-1] if messages[-1]["role"] == ASSISTANT else messages
        if prompt in (None, "", []):
            names = ", ".join(sorted(map(str, row))) or "none"
            raise UsageError(f"{where}: no {PROMPT} or {MESSAGES}; its columns are: {names[:300]}", hint=_ROW)
        if not isinstance(prompt, str):
            prompt = self._render(where, _messages(where, PROMPT, prompt), ask=True)
        tokens, marks = self._encode(repair(prompt), [(0, len(prompt))])
        if not len(tokens):
            raise UsageError(f"{where}: {PROMPT} has no token")
        return token_document(tokens, {documents.PROMPT: np.ones_like(marks)}, {})

    def _conversation(self, where: str, row: Mapping[str, Any]) -> TokenDocument | None:
        if row.get(MESSAGES) is not None:
            messages = _messages(where, MESSAGES, row[MESSAGES])
            text, spans = "", []
            for place, message in enumerate(messages):
                if message["role"] == ASSISTANT:
                    text = self._render(where, messages[: place + 1])
                    spans.append((len(self._before(where, messages[:place], text)), len(text)))
            text = self._render(where, messages)
            if not spans:
                raise UsageError(f"{where}: no message of role {ASSISTANT}: nothing would be scored")
            tokens, scored = self._encode(text, spans)
        elif row.get(PROMPT) is not None and row.get(COMPLETION) is not None:
            tokens, scored = self._answer(where, PROMPT, row[PROMPT], COMPLETION, row[COMPLETION])
        else:
            lacking = COMPLETION if row.get(PROMPT) is not None else PROMPT
            names = ", ".join(sorted(map(str, row))) or "none"
            raise UsageError(f"{where}: no {lacking} or {MESSAGES}; its columns are: {names[:300]}", hint=_ROW)
        scored[:1] = 0  # nothing in its document leads there
        return token_document(tokens, {SCORED: scored}, {}) if scored.any() else None

    def _pair(self, where: str, row: Mapping[str, Any]) -> TokenDocument | None:
        for name in (CHOSEN, REJECTED):
            if row.get(name) in (None, "", []):
                other = "winner" if name == CHOSEN else "loser"
                raise UsageError(f"{where}: no {name}: a pair needs a {other}", hint=_ROW)
        chosen, rejected = row[CHOSEN], row[REJECTED]
        if type(chosen) is not type(rejected):
            raise UsageError(f"{where}: {CHOSEN} and {REJECTED} are not alike: both text, or both messages")
        prompt = row.get(PROMPT)
        if prompt is None:
            prompt, chosen, rejected = _shared_prompt(where, chosen, rejected)
        margin = row.get(MARGIN, 0.0)
        margin = 0.0 if margin is None else margin
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise UsageError(f"{where}: {MARGIN} is {margin!r}, not a finite number")
        one, scored = self._answer(where, PROMPT, prompt, CHOSEN, chosen)
        other_, scored_ = self._answer(where, PROMPT, prompt, REJECTED, rejected)
        if np.array_equal(one, other_) or not scored.any() or not scored_.any():
            return None  # nothing to prefer
        tokens = np.concatenate([one, other_])
        columns = {PAIR: np.concatenate([scored, 2 + scored_]), MARGIN: np.full(len(tokens), margin, np.float32)}
        return token_document(tokens, columns, {})

    def _answer(self, where: str, prompt_name: str, prompt: Any, name: str, answer: Any) -> tuple[Any, Any]:
        """Tokens of a prompt with an answer, and which of them are the answer's, its end among them."""
        assert self.tokenizer is not None
        if isinstance(prompt, str) and isinstance(answer, str):
            if not answer:
                raise UsageError(f"{where}: {name} is empty")
            prompt = repair(prompt)
            tokens, scored = self._encode(prompt + repair(answer), [(len(prompt), len(prompt) + len(repair(answer)))])
            if tokens[-1] != self.tokenizer.separator_id:
                tokens, scored = np.append(tokens, self.tokenizer.separator_id), np.append(scored, 1)
            return tokens, scored
        if isinstance(prompt, str) or isinstance(answer, str):
            raise UsageError(f"{where}: {prompt_name} and {name} are not alike: both text, or both messages")
        before, after = _messages(where, prompt_name, prompt), _messages(where, name, answer)
        text = self._render(where, [*before, *after])
        start = len(self._before(where, before, text))
        return self._encode(text, [(start, len(text))])

    def _before(self, where: str, messages: list[dict[str, Any]], whole: str) -> str:
        """The text up to where an answer begins: a beginning of the whole."""
        for start in (True, False):  # with what asks for an answer, where the template has that
            text = self._render(where, messages, ask=start) if messages else ""
            if whole.startswith(text):
                return text
        raise UsageError(
            f"{where}: the chat template gives other text for messages when an answer follows them",
            hint="name another one in data.chat_template: chatml, plain, or a file",
        )

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        def as_json(value: Any, **how: Any) -> str:
            return json.dumps(value, ensure_ascii=False, indent=how.get("indent"))

        # As transformers sets it up; a template is a stranger's code, so it runs in the sandbox.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refuse
        assert self.template is not None
        try:
            return environment.from_string(self.template)
        except jinja2.TemplateError as error:
            raise UsageError(f"data.chat_template: no template of jinja ({error})") from None

    def _render(self, where: str, messages: Sequence[Mapping[str, Any]], *, ask: bool = False) -> str:
        if self.template is None:
            raise UsageError(
                f"{where}: the tokenizer brings no chat template",
                hint="set data.chat_template: chatml, plain, or the path of a jinja file",
            )
        import jinja2

        try:
            text = self._compiled.render(messages=messages, add_generation_prompt=ask, **self.specials)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            what = line_of(error, "?")[:200]
            raise UsageError(f"{where}: the chat template cannot take these messages ({what})") from None
        return repair(text)

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        assert self.tokenizer is not None
        backend = Backend.from_str(self.tokenizer.json)  # names of special tokens stand for them here
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
        """Token ids of a text, int64 [n], and 1 where a token reaches into one of the spans (characters), else 0."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        tokens, scored = np.array(encoding.ids, np.int64), np.zeros(len(encoding.ids), np.int64)
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        for start, stop in spans:
            scored[(ends > start) & (begins < stop)] = 1
        return tokens, scored


def _shared_prompt(where: str, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Where a pair has no prompt of its own: what both sides begin with, and the rest of each."""
    if isinstance(chosen, str):
        alike = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        shared = "".join(letter for letter, _ in alike)
        if 0 < len(shared) < min(len(chosen), len(rejected)) and shared[-1] == " ":
            shared = shared[:-1]  # a blank belongs to the word that follows
        at = len(shared)
    else:
        alike = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        at = sum(1 for _ in alike)
        rest = [side[at:] for side in (chosen, rejected)]
        if any(isinstance(m, Mapping) and m.get("role") != ASSISTANT for side in rest for m in side[:1]):
            raise _differ(where)
    if not at or at in (len(chosen), len(rejected)):
        raise _differ(where)
    return chosen[:at], chosen[at:], rejected[at:]


def _differ(where: str) -> UsageError:
    return UsageError(
        f"{where}: the prompts of {CHOSEN} and {REJECTED} differ", hint=f"a pair is two answers to one {PROMPT}"
    )


def _messages(where: str, name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: {name} is no list of messages", hint='as [{"role": "user", "content": "…"}]')
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where}: {name} holds something that is no message with a role and a content")
        if message.get("content") is None and message["role"] == ASSISTANT and not message.get("tool_calls"):
            raise UsageError(f"{where}: {name} holds a message of {ASSISTANT} without content")
    return [dict(message) for message in value]


def _tokenizer_config(directory: Path) -> Mapping[str, Any]:
    try:
        content = files.read_json(directory / "tokenizer_config.json", limit=_FILE_BYTES)
    except (OSError, ValueError, StackWiseError):  # it need not be there
        return {}
    return content if isinstance(content, dict) else {}


def _own_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The template of a tokenizer's folder: a file of its own, or an entry of its configuration."""
    if os.path.isfile(path := directory / "chat_template.jinja"):
        return _file(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def copy_template(tokenizer: Path, directory: Path) -> None:
    """Put beside a copied tokenizer what its folder says about conversations, where it says something."""
    home = tokenizer if tokenizer.is_dir() else tokenizer.parent
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if os.path.isfile(home / name):
            write_bytes(directory / name, _file(home / name).encode())


def _file(path: Path) -> str:
    try:
        return files.read_text(Path(os.path.realpath(path)), limit=_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        names = ", ".join(TEMPLATES)
        raise NotFound(f"data.chat_template: {path} does not exist", hint=f"it is {names}, or a jinja file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"data.chat_template: {path} cannot be read ({getattr(error, 'message', error)})") from None


def _name_of(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
