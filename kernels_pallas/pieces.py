"""Widths that are no power of two, for kernels that can only load powers of two."""


def column_pieces(width: int, smallest: int = 16) -> list[tuple[int, int]]:
    """(offset, width) of the powers of two that cover `width` columns: 72 is 64 + 16, of which 8 do not exist.

    Args:
        smallest: no piece is narrower; 16 is the tensor cores' smallest contraction.
    """
    pieces, offset = [], 0
    while offset < width:
        piece = max(smallest, 1 << ((width - offset).bit_length() - 1))
        pieces.append((offset, piece))
        offset += piece
    return pieces
