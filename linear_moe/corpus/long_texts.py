"""Cuts long texts into pieces of bounded size whose tokens are those of the whole text."""

from collections.abc import Iterable, Iterator

LONGEST_PIECE = 1 << 20  # characters; a whole book in one call of a tokenizer takes 250 bytes of memory a character


def pieces_of(text: str, longest: int = LONGEST_PIECE) -> Iterator[str]:
    """Cuts a long text between two lines, at a newline with visible characters on both sides.

    There the pre-tokenizers of byte-level BPE cut as well, so the tokens are those of the whole text. (Blank lines and
    indentation are no such place: how whitespace is grouped depends on what follows.) A text without one within
    `longest` characters is cut there, at the cost of one token boundary.
    """
    start = 0
    while len(text) - start > longest:
        end = _end_of_piece(text, start, longest)
        yield text[start:end]
        start = end
    yield text[start:]


def pieces_of_stream(blocks: Iterable[str], longest: int = LONGEST_PIECE) -> Iterator[str]:
    """The pieces of `pieces_of` of a text that comes in blocks of any size. At most a block and a piece are held."""
    text = ""
    for block in blocks:
        text += block
        while len(text) > longest:
            end = _end_of_piece(text, 0, longest)
            yield text[:end]
            text = text[end:]
    yield text


def _end_of_piece(text: str, start: int, longest: int) -> int:
    """Where the piece from `start` on ends. `text` has more than `longest` characters from there."""
    cut = text.rfind("\n", start + 1, start + longest)
    while cut > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
        cut = text.rfind("\n", start + 1, cut)
    return cut + 1 if cut > 0 else start + longest
