"""Conversion of text to tokens and back, also for streams of tokens."""

from __future__ import annotations


class Bytes:
    """The simplest tokenizer: the bytes of UTF-8 are ids 0 to 255. Other ids are shown as <id>."""

    eos = None

    def encode(self, text):
        """Encode a text."""
        return list(text.encode())

    def decode(self, ids):
        """Decode ids. Invalid UTF-8 becomes U+FFFD."""
        out, run = [], bytearray()
        for i in ids:
            if i < 256:
                run.append(i)
            else:
                out.append(run.decode(errors="replace"))
                run.clear()
                out.append(f"<{i}>")
        return "".join(out) + run.decode(errors="replace")


def load_tokenizer(path):
    """Load a tokenizer that tokenizer.py has saved. None: Bytes."""
    if path is None:
        return Bytes()
    from ..tokenizer import Tokenizer

    return Tokenizer.load(path)


class TextStream:
    """Turns the ids of one answer into pieces of text.

    Text that may be the beginning of a stop string or an incomplete character is held back until more ids follow.

    Parameters
    ----------
    tokenizer : Bytes or Tokenizer
    stop : list of str
        Stop strings. The text ends before the first one.
    """

    def __init__(self, tokenizer, stop=()):
        self._tokenizer, self._stop, self._ids, self._sent = tokenizer, [s for s in stop if s], [], 0
        self.stopped = False

    def feed(self, ids, last=False):
        """Add ids; return the text that is now certain. last: no more ids follow."""
        if self.stopped:
            return ""
        self._ids += [i for i in ids if i != self._tokenizer.eos]
        text = self._tokenizer.decode(self._ids)
        ends = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            certain = min(ends)
        elif last:
            certain = len(text)
        else:
            certain = len(text.rstrip("\ufffd"))
            for s in self._stop:
                for n in range(min(len(s) - 1, certain), 0, -1):
                    if text[:certain].endswith(s[:n]):
                        certain -= n
                        break
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        return piece


def chat_prompt(messages):
    """Format a conversation as one text. The model continues it with the next part of the assistant."""
    parts = [f"{m['role']}: {_content(m['content'])}\n" for m in messages]
    return "".join(parts) + "assistant:"


def _content(content):
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
